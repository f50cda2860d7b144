"""A rehearsal: nothing of it stays, it says what a run would take, and it fails where the run would."""

from __future__ import annotations

import functools
import re
import tempfile

import pytest
import torch
from problems import ADAMW, classes, mlp
from torch import nn

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.rehearsal import rehearse
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.telemetry import Checkpointed, ListSink, Noted, RunFinished, RunStarted

seen: list[str] = []
SAMPLES = 80


class Counting(nn.Module):
    """A model that counts its forwards in a buffer, and in Python."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.register_buffer("forwards", torch.zeros(()))
        self.calls = []

    def forward(self, x):
        self.forwards += 1
        self.calls.append(len(x))
        return self.layers(x)


def evaluated(model, batch):
    seen.append("evaluate")
    return {"right": (model(batch[0]).argmax(1) == batch[1]).double().mean()}


def each_epoch(model, row):
    seen.append("each_epoch")
    assert not model.training


def after_step(model):
    seen.append("after_step")
    model.layers[0].weight.clamp_(-1, 1)


def state_of(model, optimizer):
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "calls": list(model.calls),
        "gradients": [p.grad for p in model.parameters()],
        "state": dict(optimizer.state),
        "rates": [group["lr"] for group in optimizer.param_groups],
        "random": torch.get_rng_state(),
        "seen": list(seen),
        "training": model.training,
    }


def rehearsed(world, options):
    """Rehearse; returns what there was before and after, and the sink."""
    sink = ListSink()
    model = Counting()
    if world.size > 1 and options["strategy"].startswith("pp"):
        model.forward = model.layers.forward  # a pipeline refuses what it counts
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    of_task = {
        "val": classes(50),
        "evaluate": evaluated,
        "each_epoch": each_epoch,
        "batch_size": 8,
        "loss": "cross_entropy",
    }
    if world.size == 1 or options.get("strategy", "dp").startswith("dp"):
        of_task["after_step"] = after_step
    task = Task.create(model, classes(SAMPLES), optimizer=optimizer, **of_task)
    options = {"epochs": 3, **options}
    plan = Plan.create(ranks=world.size, cores=1, **task.options | {"rehearse": True} | options)
    before = state_of(model, optimizer)
    result = rehearse(task, plan, world, run_id="run", sinks=[sink])
    return before, state_of(model, optimizer), sink.events, result


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("dp=1", {}), ("dp=2", {}), ("shard=2", {"keep_best": "val_right:max"}), ("tp=2", {}), ("pp=2", {}),
        ("dp=2", {"ema": 0.9, "precision": "bf16"}), ("dp=2", {"epochs": None, "steps": 500, "each_epoch": ""}),
    ],
)  # fmt: skip
def test_all_is_as_before(run_ranks, mesh, options):
    """Weights, buffers, optimizers, gradients, rates, generators, and what model and functions keep in Python."""
    size = int(re.findall(r"\d", mesh)[0])
    for rank, (before, after, events, result) in enumerate(run_ranks(size, rehearsed, {"strategy": mesh, **options})):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert {"finished"} == {event.state for event in events if isinstance(event, RunFinished)}
        assert isinstance(events[-1], RunFinished)
        notes = [event.text for event in events if isinstance(event, Noted)]
        assert 2 == result.history[0]["steps"]
        if rank == 0:
            assert any(text.startswith("rehearsed: 2 steps, an evaluation of 2 batches") for text in notes)
            assert any("its resume; all is as before" in text for text in notes)
            whole = "500 steps" if "steps" in options else "3 epochs of 10 steps"
            assert any(f"{whole} take about" in text and "a step takes" in text for text in notes)
            assert any(text.startswith("memory: a rank needs up to") for text in notes)
            assert (
                10 == next(event for event in events if isinstance(event, RunStarted)).steps_total or "steps" in options
            )


def test_a_checkpoint_is_tried_in_its_folder_which_stays_as_it_was(tmp_path, monkeypatch):
    """Nothing is left in it, nor where there is none."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    for options in ({"checkpoint": str(tmp_path / "there")}, {"checkpoint": str(tmp_path / "new" / "one")}, {}):
        _, _, events, _ = rehearsed(World(), options)
        folder = options.get("checkpoint", str(tmp_path / "elsewhere"))
        assert any(event.path.startswith(folder) for event in events if isinstance(event, Checkpointed))
    assert ["mine.txt"] == [path.name for path in (tmp_path / "there").iterdir()]
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "elsewhere").glob("nbdist-*"))


def failing(model, row):
    raise ValueError("no such folder")


def too_large(model, batch):
    return {"right": torch.ones(3)}


class Unsaved(torch.optim.SGD):
    """Keeps what a checkpoint cannot hold."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["thing"] = object()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"each_epoch": failing}, TaskError, "each_epoch=failing fails after epoch 1: ValueError: no such folder"),
        ({"val": classes(20), "evaluate": too_large, "check": "no"}, TaskError, r"too_large\['right'\] is a tensor"),
        ({"checkpoint": "/proc/none"}, PlanError, "cannot write to checkpoint"),
        ({"optimizer": functools.partial(Unsaved, lr=0.1)}, TaskError, "thing"),
        ({"rehearse": "perhaps"}, PlanError, "rehearse"),
    ],
)
def test_what_would_fail_later_fails_now(options, error, words):
    """In the first epoch's end, in a checkpoint; the model is as before."""
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words):
        nbdist.train(model, classes(40), loss="cross_entropy", verbose=False, **{"rehearse": True, **options})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_script_rehearses_with_one_word(capsys):
    """The result has the model as it was, and no record is written."""
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = len(nbdist.past_runs())
    result = nbdist.train(model, classes(40), loss="cross_entropy", optimizer=ADAMW, rehearse=True, epochs=7)
    torch.testing.assert_close(result.model.state_dict(), before, rtol=0, atol=0)
    assert result.model is model
    assert len(nbdist.past_runs()) == runs
    assert "7 epochs of 2 steps take about" in capsys.readouterr().err


def test_the_run_afterwards_has_the_bits_of_one_without():
    """Nothing that it draws or counts stays."""
    weights = []
    for rehearses in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Counting()
        options = {"loss": "cross_entropy", "val": classes(20), "verbose": False, "epochs": 2, "optimizer": ADAMW}
        if rehearses:
            nbdist.train(model, classes(40), rehearse=True, **options)
        nbdist.train(model, classes(40), **options)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)
