"""Deterministic gradient sync (`--reproducible`): the same bits on any number of ranks."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from problems import OPTIMIZERS, SGD, assert_same_bits, classes, mlp, seeded, train
from torch import nn
from torch.nn import functional as F
from torch.utils import data as torch_data

from nbdist.core.comm.world import World
from nbdist.errors import PlanError
from nbdist.plan import Plan

SIZES = [2, 3, pytest.param(4, marks=pytest.mark.parity)]
SAMPLES, BATCH, EPOCHS = 65, 24, 2  # the last batch holds 17, which fill 8 slices


class Statistics(nn.Module):
    """BatchNorm, dropout, an embedding used in part, tied weights, and an infinite constant."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 6)
        self.again = nn.Linear(16, 6)
        self.again.weight = self.second.weight
        self.never = nn.Linear(2, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0]))
        self.register_buffer("seen", torch.tensor([False, False]))

    def forward(self, x):
        if self.training:
            self.seen[0] = True
        h = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        return (self.second(h) + self.again(h.flip(0)))[:, :3]


class Stream(torch_data.IterableDataset):
    def __iter__(self):
        x, y = classes(SAMPLES, torch.float32)
        return iter([(x[i], y[i]) for i in range(SAMPLES)])


def drawing(model, batch):
    """A step that draws from every generator, and whose mean is over some targets only."""
    x, y = batch
    x = x * random.uniform(0.5, 1.5) + float(np.random.rand()) + torch.rand(1)
    y = torch.where(x[:, 0] > 1.0, y, -100)
    return F.cross_entropy(model(x), y), (y >= 0).sum()


def loaded(data):
    return torch_data.DataLoader(data, batch_size=BATCH)


def large():
    return nn.Sequential(nn.Linear(6, 700), nn.ReLU(), nn.Dropout(0.2), nn.Linear(700, 200), nn.Linear(200, 3))


def weighted():
    return nn.CrossEntropyLoss(weight=torch.tensor([0.3, 1.7, 0.9]))


CASES = {
    **{name: lambda make=make: (mlp(torch.float32, 0.3), {"optimizer": make}) for name, make in OPTIMIZERS.items()},
    "weights shared": lambda: (seeded(large), {"optimizer": OPTIMIZERS["adamw"]}),
    "clipped": lambda: (seeded(large), {"optimizer": OPTIMIZERS["adamw"], "clip_norm": 0.1}),
    "buffers": lambda: (seeded(Statistics), {"optimizer": SGD}),
    "drawing": lambda: (mlp(torch.float32), {"optimizer": SGD, "loss": None, "step": drawing}),
    "class weights": lambda: (mlp(torch.float32), {"optimizer": SGD, "loss": weighted()}),
    "fp16": lambda: (mlp(torch.float32), {"optimizer": SGD, "precision": "fp16"}),
    "a stream": lambda: (mlp(torch.float32), {"optimizer": SGD, "data": loaded(Stream())}),
    "eight slices": lambda: (mlp(torch.float32), {"optimizer": SGD, "reproducible": 8}),
    "twelve slices": lambda: (seeded(Statistics), {"optimizer": SGD, "reproducible": 12}),
}


def run(world):
    """For each case its history, without seconds, and its weights and buffers."""
    found = []
    for make in CASES.values():
        model, options = make()
        given = {
            "data": classes(SAMPLES, torch.float32), "val": classes(31, torch.float32), "metric": "accuracy",
            "reproducible": True, "epochs": EPOCHS, "batch_size": BATCH, "check": "no",
        } | options  # fmt: skip
        result, _ = train(world, model, given.pop("data"), **given)
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        found.append((history, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
    return found


@pytest.fixture(scope="module")
def expected():
    return run(World())


@pytest.mark.parametrize("size", SIZES)
def test_no_bit_depends_on_the_number_of_ranks(run_on_each_channel, expected, size):
    """Weights, buffers, losses and metrics, over every kind of channel."""
    for rank in run_on_each_channel(size, run):
        for name, (history, state), (expected_history, expected_state) in zip(CASES, rank, expected, strict=True):
            assert expected_history == history, name
            assert_same_bits(expected_state, state)


def test_other_slices_give_other_bits(expected):
    """The cases above are sensitive: four slices give other bits than eight, and each draws its own dropout."""
    by_name = dict(zip(CASES, expected, strict=True))
    assert by_name["sgd"][0] != by_name["eight slices"][0]


@pytest.mark.parametrize("name", ["clipped", "buffers"])
def test_losses_equal_those_of_ordinary_training(expected, name):
    """Losses are those of the same slices in one process, to rounding; BatchNorm counts one batch a step."""
    model, options = CASES[name]()
    result, _ = train(
        World(),
        model,
        classes(SAMPLES, torch.float32),
        batch_size=BATCH,
        epochs=EPOCHS,
        accumulate=4,
        check="mesh",
        **options,
    )
    history, state = dict(zip(CASES, expected, strict=True))[name]
    if name == "buffers":
        assert 2 * 3 == state["norm.num_batches_tracked"]
    assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in result.history], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "shard"}, "mesh shard=2 cuts it: use --strategy data"),
        ({"accumulate": 2}, "accumulate depends on the number of ranks"),
        ({"sync_batchnorm": True}, "sync_batchnorm depends on the number of ranks"),
        ({"reproducible": 1}, "1 slices, too few for 2 ranks: use --reproducible 2 or fewer ranks"),
        ({"reproducible": -1}, "reproducible -1 is too small"),
        ({"batch_size": 3}, r"batch_size 3 is smaller than its 4 slices \(reproducible=4\)"),
    ],
)
def test_what_depends_on_the_number_of_ranks_is_refused(options, words):
    """In one sentence, with what to do, before anything has started."""
    with pytest.raises(PlanError, match=words):
        Plan.create(ranks=2, cores=4, **{"reproducible": True, **options})


def test_threads_are_part_of_the_arithmetic():
    """One thread per rank by default: a share of the cores would depend on the number of ranks."""
    assert [1, 1, 1] == [Plan.create(ranks=n, cores=8, reproducible=True).threads for n in (1, 2, 4)]
    assert Plan.create(ranks=2, cores=8, reproducible=True, threads=3).threads == 3


def test_torch_settings_are_restored(home):
    """Deterministic algorithms while it trains, then the user's setting again."""
    seen = []

    def step(model, batch):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return F.cross_entropy(model(batch[0]), batch[1])

    train(World(), mlp(torch.float32), classes(24, torch.float32), step=step, batch_size=24, reproducible=True)
    assert {True} == set(seen)
    assert not torch.are_deterministic_algorithms_enabled()
