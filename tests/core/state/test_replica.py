"""A replica that is left is resumed from alone, with the bits and the history of an undisturbed run."""

from __future__ import annotations

import os
import random

import pytest
import torch
from problems import ADAMW, FEATURES, assert_same_bits, classes, seeded, train
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.state.snapshot import Head, SnapshotBuffer, SnapshotStore, newest, newest_whole
from nbdist.errors import PeerLostError
from nbdist.segment_path import open_segment

SAMPLES, BATCH, TORN = 80, 16, 7
OPTIONS = {"optimizer": ADAMW, "batch_size": BATCH, "epochs": 3, "val": classes(32, torch.float32), "check": "no"}


class Net(nn.Module):
    """Dropout, a frozen layer, and a buffer that no step changes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x):
        return self.frozen(self.layers(x)) * self.scale


class Statistics(Net):
    """Each rank has running statistics of its own."""

    def __init__(self):
        super().__init__()
        self.layers.append(nn.BatchNorm1d(3))


class Counting(Net):
    """Each rank has extra state of its own."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self):
        return self.calls

    def set_extra_state(self, state):
        self.calls = state


class Teacher(Net):
    """A frozen parameter changes in each step."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.frozen.bias.add_(0.01)
        return super().forward(x)


class Drawing(Net):
    """Draws what no step seeds."""

    def forward(self, x):
        return super().forward(x + random.random())


def loss(y, target):
    return F.cross_entropy(y, target)


def torn(y, target):
    """Fails in one step, on all ranks that compute a loss."""
    if torch.is_grad_enabled() and nbdist.current_step() == TORN:
        raise ValueError("torn")
    return loss(y, target)


def carrying(model, batch):
    state = nbdist.carried(count=0)
    state.count += 1
    return torn(model(batch[0]), batch[1])


def undisturbed(world, make, options):
    result, tensors = train(world, seeded(make), classes(SAMPLES, torch.float32), loss=loss, **OPTIONS | options)
    return rows(result), tensors


def failing(world, make, paths, options):
    given = {"loss": torn} | options
    failed = False
    try:
        train(world, seeded(make), classes(SAMPLES, torch.float32), snapshot_paths=paths, **OPTIONS | given)
    except (ValueError, PeerLostError, OSError):  # its own, or that of a connection to a rank that has failed
        failed = True
    assert failed


def resumed(world, make, paths, options):
    result, tensors = train(
        world, seeded(make), classes(SAMPLES, torch.float32), loss=loss, snapshot_paths=paths, from_snapshot=True,
        **OPTIONS | options,
    )  # fmt: skip
    return rows(result), tensors


def rows(result):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def rounded(history):
    """The losses of ranks that are lost are rounded as gradients are."""
    return [{**row, "loss": pytest.approx(row["loss"], rel=1e-6)} for row in history]


def lose(store, ranks):
    """The memory of these ranks is lost."""
    for path in (path for rank in ranks for path in store.paths[rank]):
        with os.fdopen(open_segment(path), "r+b") as memory:
            memory.write(Head.none())


@pytest.mark.parametrize(
    ("strategy", "lost"),
    [
        ("dp=2", [0]), ("dp=2", [1]), ("dp=3", [0, 2]), ("dp=2,pp=2", [0, 1]), ("dp=2,pp=2", [2, 3]),
        ("dp=2,shard=2", [0, 1]), ("dp=2,tp=2", [2, 3]),
    ],
)  # fmt: skip
def test_no_step_is_repeated(run_ranks, strategy, lost):
    """Nor counted twice, whichever replica is left; on a smaller mesh the history is the same."""
    ranks = len(lost) if strategy == "dp=3" else 2 * len(lost)
    ranks = 3 if strategy == "dp=3" else ranks
    store, options = SnapshotStore(ranks), {"strategy": strategy}
    expected = run_ranks(ranks, undisturbed, Net, options)
    run_ranks(ranks, failing, Net, store.paths, options)
    lose(store, lost)
    step, buffers = newest(store.paths)
    assert step == TORN
    assert not buffers.keys() & {*lost}
    for (history, tensors), (expected_history, expected_tensors) in zip(
        run_ranks(ranks, resumed, Net, store.paths, options), expected, strict=True
    ):
        assert history == rounded(expected_history)
        assert_same_bits(tensors, expected_tensors)
    store.close()


def test_fewer_ranks_resume_from_a_replica(run_ranks):
    """With the same counts."""
    store = SnapshotStore(2)
    (expected, _), _ = run_ranks(2, undisturbed, Net, {})
    run_ranks(2, failing, Net, store.paths, {})
    lose(store, [0])
    ((history, _),) = run_ranks(1, resumed, Net, store.paths, {"accumulate": 2})
    for row, other in zip(history, expected, strict=True):
        assert {**row, "loss": 0, "val_loss": 0} == {**other, "loss": 0, "val_loss": 0}
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
    store.close()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Statistics, {}), (Counting, {}), (Teacher, {}), (Drawing, {}),
        (Net, {"loss": None, "step": carrying, "shuffle": False}),
    ],
    ids=["statistics", "extra state", "a frozen parameter", "random numbers", "carried values"],
)  # fmt: skip
def test_what_differs_from_rank_to_rank_is_not_taken_from_another(run_ranks, make, options):
    """Without the lost rank there is no whole snapshot."""
    store = SnapshotStore(2)
    run_ranks(2, failing, make, store.paths, options)
    assert newest(store.paths)[0] <= TORN
    lose(store, [1])
    assert newest(store.paths) is None
    store.close()


def head(step, ranks=4, replica=0, members=0):
    return Head(step, 1, ranks, 100, replica, members)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ({0: [head(3, 2)], 1: [head(3, 2)]}, [0, 1]),
        ({0: [head(3, 2)], 1: [head(4, 2)]}, []),
        ({0: [head(3, 2)]}, []),
        ({0: [], 1: []}, []),
        ({2: [head(3, 4, 2, 2)], 3: [head(3, 4, 2, 2)]}, [2, 3]),
        ({2: [head(3, 4, 2, 2)], 3: [head(4, 4, 2, 2)]}, []),
        ({1: [head(3, 4, 1, 2)], 3: [head(3, 4, 2, 2)]}, []),
        ({r: [head(3, 4, 1 + r // 2, 2)] for r in range(4)}, [0, 1, 2, 3]),
        ({r: [head(2), head(3, 4, 1 + r // 2, 2)][: 2 if r > 1 else 1] for r in range(4)}, [2, 3]),
        ({0: [head(3, 4, 1, 2)], 1: [head(3, 4, 0, 0)]}, []),
    ],
)
def test_which_snapshot_is_whole(heads, expected):
    """That of all ranks, or of one replica; the newest."""
    assert expected == [*newest_whole(heads)]


def test_a_share_is_marked_when_it_is_complete(run_ranks):
    """A periodic snapshot is none."""
    store = SnapshotStore(2)
    run_ranks(2, undisturbed_with_snapshots, store.paths)
    assert [(0, 0)] * 2 == [buffer.head[4:] for buffer in newest(store.paths)[1].values()]
    run_ranks(2, failing, Net, store.paths, {})
    found = [{SnapshotBuffer(path).head[4:] for path in own} for own in store.paths]
    assert all({(1 + rank, 1)} <= own for rank, own in enumerate(found))
    store.close()


def undisturbed_with_snapshots(world, paths):
    train(world, seeded(Net), classes(SAMPLES, torch.float32), loss=loss, snapshot_paths=paths, **OPTIONS)
