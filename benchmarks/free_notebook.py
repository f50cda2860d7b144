"""What does the notebook cost? CPU-seconds a step in the notebook, beside the same training under torchrun.

    python benchmarks/free_notebook.py [--pairs 20] [--json]

Two ranks, the data strategy, a step of about 3 ms. Ours is the CPU time of every process while `%dist_train` runs with
its panel: the kernel, the controller, the engines and their nannies. The peer's is that of torchrun and its ranks. Both
live through all pairs and train in turn, so start-up is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from kernel import Kernel
from pairs import Comparison, arguments, report

STEPS = 1500
POLL_S = 0.02
TASK = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 50))
x, y = torch.randn(4096, 256), torch.randint(0, 50, (4096,))
"""
LINE = f"%dist_train model (x, y) --loss cross_entropy --batch-size 256 --steps {STEPS} --threads 1"
RANK = (
    TASK
    + f"""
import os, pathlib, sys, time
import nbdist
folder = pathlib.Path(sys.argv[1])
for pair in range(int(sys.argv[2])):
    while not (folder / f"go{{pair}}").exists():
        time.sleep({POLL_S})
    nbdist.train(model, (x, y), loss="cross_entropy", batch_size=256, steps={STEPS}, threads=1, verbose=False)
    (folder / f"done{{pair}}.{{os.environ['RANK']}}").touch()
"""
)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """CPU-seconds of processes so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextmanager
def torchrun(pairs: int, folder: Path) -> Iterator[list[psutil.Process]]:
    """Two ranks that train when a file tells them to; yields all processes."""
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.Popen(
        [*command, str(folder / "rank.py"), str(folder), str(pairs)], stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        agent = psutil.Process(job.pid)
        while len(agent.children()) < 2:
            time.sleep(POLL_S)
        yield [agent, *agent.children()]
    finally:
        job.terminate()
        job.wait()


class Notebook:
    """A kernel with a cluster of two engines, that trains the task with its panel. A context manager."""

    def __enter__(self) -> Notebook:
        self._kernel = Kernel()
        self._kernel.__enter__()
        self._kernel.run("%dist_start -n 2 --device cpu\n" + TASK)
        pids = self._kernel.run("import nbdist\nprint(*(engine.pid for engine in nbdist.current_cluster().engines))")
        self._engines = [psutil.Process(int(pid)) for pid in pids.split()]
        return self

    def __exit__(self, *error: Any) -> None:
        self._kernel.__exit__(*error)

    def train(self) -> tuple[float, float]:
        """CPU-seconds of the notebook (kernel, controller, nannies) and of its engines."""
        family = [self._kernel.process, *self._kernel.family()]
        sides = [process for process in family if process not in self._engines], self._engines
        before = [cpu_seconds(side) for side in sides]
        self._kernel.run(LINE)
        notebook, engines = (cpu_seconds(side) - then for side, then in zip(sides, before, strict=True))
        return notebook, engines


def measure_a_second(pairs: int) -> Comparison:
    """What the notebook takes for each second of a training, beside one import of torch; both are CPU time."""
    ours, peer = [], []
    with Notebook() as notebook:
        notebook.train()  # warms up, while the spare starts
        for _ in range(pairs):
            began_s = time.perf_counter()
            cpu_s, _ = notebook.train()
            ours.append(1000 * cpu_s / (time.perf_counter() - began_s))
            before_s = sum(os.times()[2:4])
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            peer.append(1000 * (sum(os.times()[2:4]) - before_s))
    return Comparison(name="the notebook alone, a second", unit="ms", ours=ours, peer=peer, target="")


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=20).parse_args()
    ours, peer = [], []
    pairs = options.pairs + 1
    with tempfile.TemporaryDirectory() as name, Notebook() as notebook, torchrun(pairs, Path(name)) as ranks:
        for pair in range(pairs):
            mine = 1000 * sum(notebook.train()) / STEPS
            before = cpu_seconds(ranks)
            (Path(name) / f"go{pair}").touch()
            while len(list(Path(name).glob(f"done{pair}.*"))) < 2:
                time.sleep(POLL_S)
            theirs = 1000 * (cpu_seconds(ranks) - before) / STEPS
            if pair:  # the first one warms both up
                ours.append(mine)
                peer.append(theirs)
    found = Comparison(name="CPU-milliseconds a step", unit="ms", ours=ours, peer=peer, target="at most 1.03")
    report([found], as_json=options.json, peer="torchrun")
    if not options.json:
        low, high = found.interval()
        print(f"the median lies between {low:.3f} and {high:.3f} (95 %, {options.pairs} pairs)")


if __name__ == "__main__":
    main()
