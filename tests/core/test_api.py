"""`nbdist.train` in scripts: alone, under torchrun, and on ranks that disagree."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import SGD, classes, mlp, weights

import nbdist
from nbdist.errors import PlanError, TaskError

# The gradient of one number is a sum over all elements, and its bits depend on how many threads add them.
SCRIPT = """
import hashlib
import os
import sys

import torch

import nbdist


class Shift(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.shift


torch.manual_seed(0)
x = torch.randn(40, 20_000)
model = torch.nn.Sequential(torch.nn.Linear(20_000, 4), torch.nn.Linear(4, 20_000), Shift())
for _ in range(2):  # a script may train more than once
    result = nbdist.train(
        model, (x, x), loss="mse", optimizer="sgd", lr=0.1, epochs=2, batch_size=16, threads=1,
        accumulate=int(sys.argv[1]), device="cpu", verbose=False,
    )
if os.environ.get("RANK", "0") == "0":
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    print(digest, result.plan.mesh, [row["loss"] for row in result.history])
"""


def start(command, script, accumulate, **environment):
    return subprocess.Popen(
        [sys.executable, *command, str(script), str(accumulate)], env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.programs
def test_torchrun_and_python_give_the_same_bits(tmp_path, home):
    """A script on two torchrun ranks trains as plain python with two microbatches, whatever OMP_NUM_THREADS is."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    processes = [
        start(torchrun, script, 1, OMP_NUM_THREADS="1"),
        start([], script, 2, OMP_NUM_THREADS="3"),
    ]
    outputs = [process.communicate() for process in processes]
    assert [0, 0] == [process.returncode for process in processes], outputs
    (digest, mesh, losses), (digest_alone, mesh_alone, losses_alone) = (out.split(maxsplit=2) for out, _ in outputs)
    assert ("dp=2", "dp=1") == (mesh, mesh_alone)
    assert digest == digest_alone
    assert losses == losses_alone
    assert [1, 1, 2, 2] == sorted(len(list(run.iterdir())) for run in (home / "runs").iterdir())


def test_a_run_leaves_a_record(home, capsys):
    """One line of JSON per event, readable by the owner only; and lines of text on standard error."""
    result = nbdist.train(
        mlp(), classes(12), loss="cross_entropy", optimizer=SGD, epochs=2, batch_size=4, val=classes(5), device="cpu"
    )
    (path,) = (home / "runs").glob("*/rank0.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["RunStarted", "RunFinished"] == [events[0]["event"], events[-1]["event"]]
    assert result.history == [event["row"] for event in events if event["event"] == "EpochFinished"]
    assert (path.parent.name, "dp=1") == (events[0]["run_id"], f"dp={events[0]['plan']['mesh']['dp']}")
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    printed = capsys.readouterr()
    assert "" == printed.out
    assert all(line.startswith("nbdist: ") for line in printed.err.splitlines())
    assert "nbdist: finished" == printed.err.splitlines()[-1]


def test_a_quiet_run_without_a_record(home, capsys):
    """``verbose=False`` prints nothing, ``record=False`` writes nothing."""
    nbdist.train(mlp(), classes(12), loss="cross_entropy", optimizer=SGD, device="cpu", verbose=False, record=False)
    assert ("", "") == capsys.readouterr()
    assert [] == list(home.iterdir())


def disagree(world):
    nbdist.train(mlp(), classes(12), loss="cross_entropy", seed=world.rank, device="cpu", verbose=False)


def test_ranks_with_different_plans_are_refused(run_ranks):
    """Before the first step ranks compare their plans; the error names the option that differs."""
    with pytest.raises(PlanError, match="rank 1 was given seed=1, rank 0 0: all ranks need the same"):
        run_ranks(2, disagree)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "dataa"}, PlanError, r"unknown strategy 'dataa': use data, .*Did you mean 'data'\?"),
        ({"strategy": "dp=2"}, PlanError, r"strategy 'dp=2' needs 2 ranks, but there are 1: use dp=1, or start 2 eng"),
        ({"batch_size": 2, "accumulate": 3}, PlanError, "batch_size 2 is smaller than its 3 slices"),
        ({"device": "gpu"}, PlanError, "unknown device 'gpu'"),
        ({"loss": 3}, TaskError, "loss must be a name or a callable, not 3"),
    ],
)
def test_a_mistake_is_one_sentence(home, options, error, message):
    """It is raised before anything is trained or recorded."""
    model = mlp()
    before = weights(model)
    with pytest.raises(error, match=message):
        nbdist.train(model, classes(12), **{"loss": "cross_entropy", **options})
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert [] == list(Path(home).iterdir())
