"""The same run under torchrun gives the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tasks import copied

import nbdist
from nbdist.core.state.checkpoint_reader import CheckpointReader

pytestmark = pytest.mark.programs

SETUP = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3))
data = torch.randn(250, 6), torch.randint(3, (250,))
options = dict(
    loss="cross_entropy", optimizer="adamw", lr=0.01, epochs=2, batch_size=64, accumulate=2, clip_norm=0.5, seed=5
)
"""
SCRIPT = (
    SETUP
    + """
import nbdist, os, sys

nbdist.train(model, data, **options)
torch.save(model.state_dict(), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""
)


def torchrun(script, folder, *options):
    """Run a script on two ranks, which is given `folder`."""
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    done = subprocess.run([*command, folder / "train.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cluster_and_torchrun_give_the_same_bits(cluster, tmp_path):
    """The same model, data and options through the engines and through a script on two ranks: equal weight bytes."""
    torchrun(SCRIPT, tmp_path)

    notebook = {}
    with torch.random.fork_rng():
        exec(SETUP, notebook)
    before = copied(notebook["model"])
    cluster.train(notebook["model"], notebook["data"], **notebook["options"])
    trained = {name: tensor.numpy().tobytes() for name, tensor in notebook["model"].state_dict().items()}
    assert all(trained[name] != tensor.numpy().tobytes() for name, tensor in before.items())
    for rank in range(2):
        under_torchrun = torch.load(tmp_path / f"{rank}.pt")
        assert {name: tensor.numpy().tobytes() for name, tensor in under_torchrun.items()} == trained


KILLED = (
    SETUP
    + """
import nbdist, os, pathlib, signal, sys, time

from torch.nn import functional as F

folder = pathlib.Path(sys.argv[1])
trace, steps = folder / "killed", iter(range(1000))

def loss(output, target):
    if os.environ["RANK"] == "1" and next(steps) > 10 and not trace.exists():
        if not (folder / "kept/newest.json").exists():
            time.sleep(0.5)  # it is written meanwhile, and counts after a later step: this one must go on
        else:
            trace.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(output, target)

options |= dict(epochs=16, loss=loss, verbose=False)
nbdist.train(model, data, checkpoint=str(folder / "kept"), checkpoint_every=1, resume=True, **options)
torch.save(model.state_dict(), folder / f"{os.environ['RANK']}.pt")
"""
)


def test_a_job_that_torchrun_restarts_resumes(tmp_path, home):
    """A rank kills itself in the middle of an epoch; the job resumes, with the bits of an undisturbed one."""
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "killed").touch()
    torchrun(KILLED, tmp_path / "quiet")
    torchrun(KILLED, tmp_path, "--max-restarts", "2")
    assert (tmp_path / "killed").exists()
    for rank in range(2):
        expected, actual = (torch.load(folder / f"{rank}.pt") for folder in (tmp_path / "quiet", tmp_path))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    began = sorted(step for path in Path(home, "runs").glob("*/rank0.jsonl") for step in steps_at_the_start(path))
    assert [0, 0] == began[:2]
    assert 3 == len(began)
    assert began[2] > 0


def steps_at_the_start(path):
    """The first steps of the runs of a record."""
    events = map(json.loads, path.read_text().splitlines())
    return [event["step"] for event in events if event["event"] == "RunStarted"]


PLAIN = """
import torch
from torch import nn

torch.manual_seed(0)
make = lambda: nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3))
start = make().state_dict()
data = torch.randn(250, 6), torch.randint(3, (250,))
options = dict(
    loss="cross_entropy", optimizer="adamw", lr=0.01, batch_size=64, seed=5, threads=1, record=False, verbose=False
)

def begin():
    model = make()
    model.load_state_dict(start)
    return model
"""
BOTH_WAYS = (
    PLAIN
    + """
import nbdist, os, sys

nbdist.train(begin(), data, steps=6, checkpoint=f"{sys.argv[1]}/two", **options)
model = begin()
nbdist.train(model, data, epochs=3, resume=f"{sys.argv[1]}/one", **options)
torch.save(model.state_dict(), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""
)


def test_one_process_resumes_a_job_of_torchrun_and_the_other_way_round(tmp_path):
    """In mid-epoch: two ranks, and one process with two microbatches, run the same slices to the same bits."""
    here = {}
    with torch.random.fork_rng():
        exec(PLAIN, here)
    begin, data, options = here["begin"], here["data"], here["options"] | {"accumulate": 2, "device": "cpu"}
    expected, actual = begin(), begin()
    nbdist.train(expected, data, epochs=3, **options)
    nbdist.train(begin(), data, steps=6, checkpoint=str(tmp_path / "one"), **options)
    torchrun(BOTH_WAYS, tmp_path)
    assert 2 == len(CheckpointReader.in_folder(str(tmp_path / "two")).ranks)
    result = nbdist.train(actual, data, epochs=3, resume=str(tmp_path / "two"), **options)
    assert [6, 2, 4] == [row["steps"] for row in result.history]  # the first run's row, then one an epoch
    for state in (actual.state_dict(), *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))):
        torch.testing.assert_close(state, expected.state_dict(), rtol=0, atol=0)


PREDICTS = (
    SETUP
    + """
import nbdist, os, sys

outputs = nbdist.predict(model, data, strategy=os.environ["STRATEGY"])
torch.save((outputs, model.state_dict(), model.training), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""
)


@pytest.mark.parametrize("strategy", ["data", "shard"])
def test_a_script_predicts_on_every_rank(tmp_path, monkeypatch, strategy):
    """Outputs in order, and the whole model, as it was."""
    monkeypatch.setenv("STRATEGY", strategy)
    torchrun(PREDICTS, tmp_path)
    script = {}
    with torch.random.fork_rng():
        exec(SETUP, script)
    with torch.no_grad():
        expected = copied(script["model"]), script["model"].eval()(script["data"][0])
    for rank in range(2):
        outputs, state, training = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(outputs, expected[1])
        torch.testing.assert_close(state, expected[0], rtol=0, atol=0)
        assert training
