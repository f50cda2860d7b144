"""One run at a time writes into a checkpoint folder; a killed notebook's lease does not block others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from shared_cluster import until
from tasks import classes, net

from nbdist.core.state import folder_lease
from nbdist.core.state.checkpoint_reader import NEWEST, checkpoints
from nbdist.core.state.folder_lease import Lease
from nbdist.errors import PlanError
from nbdist.telemetry.record import records

pytestmark = pytest.mark.programs

OPTIONS = {"loss": "cross_entropy", "batch_size": 16, "epochs": 2, "threads": 1}


def test_a_run_is_refused_before_an_engine_is_touched(cluster, tmp_path, monkeypatch):
    """While another one writes into its folder; once that has ended, the same line works."""
    monkeypatch.setattr(folder_lease, "_GRACE_S", 0.0)
    theirs = Lease(str(tmp_path), "theirs").acquire()
    with pytest.raises(PlanError, match="is being written by run theirs"):
        cluster.train(net(), classes(), checkpoint=str(tmp_path), **OPTIONS)
    assert not records().exists()
    theirs.release()
    assert "finished" == cluster.train(net(), classes(), checkpoint=str(tmp_path), **OPTIONS).state
    assert {NEWEST, *checkpoints(tmp_path)} == {path.name for path in tmp_path.iterdir()}


def held_until(gate):
    """A loss that waits for a file."""

    def loss(output, target):
        import os
        import time

        from torch.nn import functional

        while not os.path.exists(gate):
            time.sleep(0.002)
        return functional.cross_entropy(output, target)

    return loss


def test_a_replacement_of_rank_0_writes_checkpoints_too(cluster, tmp_path):
    """The lease belongs to the run, not to a process."""
    folder, gate = tmp_path / "run", tmp_path / "gate"
    run = cluster.train(
        net(), classes(), checkpoint=str(folder), checkpoint_every=1, background=True,
        **OPTIONS | {"loss": held_until(str(gate))},
    )  # fmt: skip
    until(lambda: [*folder.glob(".lease-*")])
    os.kill(cluster.engines[0].pid, signal.SIGKILL)
    gate.touch()
    assert "finished" == run.wait().state
    assert 8 == run.progress.step
    assert {NEWEST, *checkpoints(folder)} == {path.name for path in folder.iterdir()}


NOTEBOOK = """
import sys, nbdist, torch
from torch import nn

def loss(output, target):
    import time
    from torch.nn import functional
    steps.append(1)
    while STOPS and len(steps) > 10: time.sleep(0.01)
    return functional.cross_entropy(output, target)

steps, STOPS = [], sys.argv[2] == "stops"
cluster = nbdist.Cluster(2, device="cpu").start()
data = torch.randn(64, 6), torch.randint(3, (64,))
run = cluster.train(nn.Linear(6, 3), data, loss=loss, batch_size=8, steps=20, checkpoint=sys.argv[1],
                    checkpoint_every=1, resume=True)
print(run.state, run.progress.step, flush=True)
"""


def test_the_same_line_works_when_its_notebook_was_killed(shared_cluster, tmp_path):
    """At once, though engines of the dead one may run a moment longer: it resumes from the last valid checkpoint."""
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    folder = tmp_path / "run"
    command = [sys.executable, str(tmp_path / "notebook.py"), str(folder)]
    first = subprocess.Popen([*command, "stops"], stdout=subprocess.PIPE)
    try:
        until(lambda: (folder / NEWEST).exists())
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    second = subprocess.run([*command, "ends"], capture_output=True, text=True)
    assert "finished 20\n" == second.stdout, second.stderr
    assert {NEWEST, *checkpoints(folder)} == {path.name for path in folder.iterdir()}
