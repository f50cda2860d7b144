"""A session of its own: a process that starts a cluster and trains, whatever its environment allows.

python session.py kernel FOLDER idle|busy     says so, and lives until it is killed
python session.py detached FOLDER WORKLOAD EPOCHS STEP   says that it is held after the step, and lives on
python session.py disk FOLDER                 trains with checkpoints into FOLDER, a disk that gets full
torchrun session.py torchrun FOLDER           the workload of 30 MiB, which goes on where it was
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import workloads
from gate import Gate
from shared_cluster import until
from traps import Traps

import nbdist
from nbdist.core.state.checkpoint_reader import CheckpointReader

LOOKS = range(20, 200, 20)
"""After which steps a run is held until the test has checked whether its first checkpoint is on the disk."""
EVERY = 2
"""Steps between two checkpoints under torchrun: fewer cost more than they save for steps of 30 ms."""


def kernel(folder: str, state: str) -> None:
    """Wait to be killed, with idle engines, or with engines in a step."""
    traps = Traps(folder)
    model, data, options = workloads.make("shared weights", traps)
    cluster = nbdist.Cluster(3, device="cpu").start()
    if state == "busy":
        traps.set("forward", 1, 4, "hang")
        cluster.train(model, data, background=True, **options)
        until(lambda: not traps.left)
    Path(folder, "ready").touch()
    sys.stdin.read()


def detached(folder: str, workload: str, epochs: str, step: str) -> None:
    """Wait to be killed in the middle of a run that is held, on a cluster that outlives it."""
    model, data, options = workloads.make(workload, Traps(folder))
    ranks = 4 if workload in workloads.MESHES else 3
    cluster = nbdist.Cluster(ranks, device="cpu", detach=60).start()
    gate = Gate(folder, int(step), scheduler=options["lr_scheduler"])
    run = cluster.train(model, data, background=True, **options | {"epochs": int(epochs), "lr_scheduler": gate})
    gate.wait(int(step), ranks=ranks, run=run)
    Path(folder, "pids").write_text(" ".join(str(engine.pid) for engine in cluster.engines))
    Path(folder, "ready").touch()
    sys.stdin.read()


def disk(folder: str) -> None:
    """Fill the disk in the middle of a run: it finishes, and the last checkpoint that fitted stays intact."""
    place, results = Path(folder, "checkpoints"), []
    with tempfile.TemporaryDirectory() as elsewhere, nbdist.Cluster(3, device="cpu") as cluster:
        for on_disk in ({}, {"checkpoint": str(place), "checkpoint_every": 5}):
            model, data, options = workloads.make("shared weights", Traps(elsewhere))
            gate = Gate(tempfile.mkdtemp(dir=elsewhere), *LOOKS, scheduler=options["lr_scheduler"])
            run = cluster.train(
                model, data, background=True, **options | {"epochs": 20, "lr_scheduler": gate, **on_disk}
            )
            if on_disk:
                for step in LOOKS:  # a checkpoint is complete a few steps after its start, when its bytes are written
                    gate.wait(step, ranks=3, run=run)
                    if (place / "newest.json").exists():
                        break
                    gate.open(step)
                _fill(folder)
            gate.open()
            run.wait()
            results.append((workloads.digest(model.state_dict()), workloads.history(run), run.state))
    step = CheckpointReader.in_folder(str(place)).ranks[0]["position"]["step"]
    print("equal" if results[0] == results[1] else f"not equal: {results}")
    print("noted" if any("could not be" in note for note in run.progress.notes) else f"not noted: {run.progress.notes}")
    print("whole" if 0 < step < 200 else f"another checkpoint than the last that fitted: step {step}")


def _fill(folder: str) -> None:
    with open(Path(folder, "filling"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass


def torchrun(folder: str) -> None:
    """The same as `Lab.survives`, with torchrun."""
    traps = Traps(folder)
    traps.begin()
    model, data, options = workloads.make("30 MiB", traps)
    result = nbdist.train(
        model, data, **options, checkpoint=f"{folder}/checkpoints", checkpoint_every=EVERY, resume=True, verbose=False
    )
    if os.environ["RANK"] == "0":
        Path(folder, "digest").write_text(workloads.digest(model.state_dict()))
        Path(folder, "history").write_text(repr(workloads.history(result)))


if __name__ == "__main__":
    {"kernel": kernel, "detached": detached, "disk": disk, "torchrun": torchrun}[sys.argv[1]](*sys.argv[2:])
