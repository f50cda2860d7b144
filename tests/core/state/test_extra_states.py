"""Extra state (``get_extra_state``) is part of what a run leaves, on any mesh, in memory and on disk."""

from __future__ import annotations

import math

import pytest
import torch
from problems import classes, seeded, stop_after, train_task
from torch import nn

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.params.extra_state import extra_states
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.restore import load_whole
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError

SAMPLES, BATCH, EPOCHS = 40, 8, 2
STEPS = EPOCHS * SAMPLES // BATCH


class Counts(nn.Module):
    """Counts its forwards in an object, and holds what torch's own checkpoints may hold; rows of a slice differ."""

    def __init__(self):
        super().__init__()
        self.seen = {"calls": 0, "last": None, (0, "key"): [b"bytes"]}

    def forward(self, x):
        if self.training:
            self.seen["calls"] += 1
            self.seen["last"] = torch.full((2,), self.seen["calls"], dtype=torch.bfloat16)
        return x + 0

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def net():
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 8), Counts(), nn.Tanh(), nn.Linear(8, 8), Counts(), nn.Linear(8, 3)),
        torch.float64,
    )


def task_of(model):
    return Task.create(model, classes(SAMPLES), loss="cross_entropy", optimizer="sgd", batch_size=BATCH)


def calls(model):
    for state in extra_states(model).values():
        assert [b"bytes"] == state[0, "key"]
        if state["calls"]:
            assert torch.equal(torch.full((2,), state["calls"], dtype=torch.bfloat16), state["last"])
    return [state["calls"] for state in extra_states(model).values()]


MESHES = {
    "dp=2": {}, "shard=2": {}, "tp=2": {}, "pp=2": {"split_at": "3", "microbatches": 1},
    "dp=2,pp=2": {"split_at": "3", "microbatches": 1}, "shard=2,pp=2": {"split_at": "3", "microbatches": 1},
}  # fmt: skip


def size_of(mesh):
    return math.prod(int(part[-1]) for part in mesh.split(","))


def run(world, mesh, options):
    task = task_of(net())
    train_task(world, task, epochs=EPOCHS, strategy=mesh, **MESHES[mesh], **options)
    return calls(task.model)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_trained_model_has_it(run_ranks, mesh):
    """On every rank, also where a module ran in the stage of another; trials of a split model count nothing."""
    assert [[STEPS] * 2] * size_of(mesh) == run_ranks(size_of(mesh), run, mesh, {})


def interrupted(world, mesh, options):
    return run(world, mesh, {**options, "commands": stop_after(3)})


def loaded(saved):
    model = net()
    load_whole(saved, model)
    return calls(model)


@pytest.mark.parametrize(("mesh", "then"), [*((mesh, mesh) for mesh in MESHES), ("dp=2,pp=2", "shard=2")])
def test_a_checkpoint_holds_it(run_ranks, tmp_path, mesh, then):
    """A run that was stopped goes on with it, on the same mesh or another; so does an ordinary model."""
    folder = str(tmp_path)
    assert [[3] * 2] * size_of(mesh) == run_ranks(size_of(mesh), interrupted, mesh, {"checkpoint": folder})
    model = net()
    nbdist.load_checkpoint(folder, model)
    assert [3, 3] == calls(model)
    again = run_ranks(size_of(then), run, then, {"resume": folder, "checkpoint": folder})
    assert [[STEPS] * 2] * size_of(then) == again
    assert [STEPS] * 2 == loaded(CheckpointReader.in_folder(folder))


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,pp=2"])
def test_a_snapshot_holds_it(run_ranks, mesh):
    """So that a run goes on after the loss of a rank."""
    store = SnapshotStore(size_of(mesh))
    run_ranks(size_of(mesh), interrupted, mesh, {"snapshot_paths": store.paths})
    assert [3, 3] == loaded(CheckpointReader.of_snapshot(store.paths))
    again = run_ranks(size_of(mesh), run, mesh, {"snapshot_paths": store.paths, "from_snapshot": True})
    assert [[STEPS] * 2] * size_of(mesh) == again
    store.close()


class Holds(Counts):
    """Its extra state is `what`."""

    def __init__(self, what):
        super().__init__()
        self.seen = what


@pytest.mark.parametrize("state", [object(), {"a": [object()]}, nn.Parameter(torch.ones(1))])
def test_what_a_checkpoint_cannot_hold_is_named_at_once(tmp_path, state):
    """Before a step; without a checkpoint it trains."""
    task = task_of(nn.Sequential(nn.Linear(6, 3), Holds(state)).double())
    with pytest.raises(TaskError, match=r"the extra state of 1(\['a'\])? is a (object|Parameter), which a checkpoint"):
        train_task(World(), task, epochs=1, checkpoint=str(tmp_path))
    before = task.model[0].weight.detach().clone()
    task.model[1].forward = lambda x: x
    train_task(World(), task, epochs=1)
    assert not torch.equal(before, task.model[0].weight)


class RootCounts(Counts):
    """The forward that is cut into stages counts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(super().forward(x))


class CalledTwice(nn.Module):
    """One module in two stages."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.counts = nn.Linear(6, 8), nn.Linear(8, 3), Counts()

    def forward(self, x):
        return self.last(self.counts(self.first(self.counts(x))))


def refused(world, make, at):
    with pytest.raises(PlanError) as error:
        train_task(world, task_of(seeded(make, torch.float64)), epochs=1, strategy="pipeline", split_at=at)
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "at", "sentence"),
    [
        (RootCounts, "layers.1", "its own forward changes its extra state"),
        (CalledTwice, "first", "counts has extra state, and is called in stages of 2 ranks"),
    ],
)
def test_a_pipeline_refuses_what_no_rank_has(run_ranks, make, at, sentence):
    """Every rank says so, before a weight is touched."""
    assert all(sentence in text for text in run_ranks(2, refused, make, at))


def test_another_models_is_refused(tmp_path):
    """Nothing has changed then."""
    train_task(World(), task_of(net()), epochs=1, checkpoint=str(tmp_path))
    other = nn.Sequential(*(nn.Identity() if isinstance(layer, Counts) else layer for layer in net()))
    before = other[0].weight.detach().clone()
    with pytest.raises(TaskError, match="the extra state of 1 is only in it; build the model as it was"):
        nbdist.load_checkpoint(str(tmp_path), other)
    assert torch.equal(before, other[0].weight)
