"""What was kept at any step is enough to go on from: the same bits as without a stop, in memory and on disk."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from problems import ADAMW, FEATURES, assert_same_bits, classes, seeded, train, weights
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.restore import load_whole
from nbdist.core.saved import Saved
from nbdist.core.snapshot import Vaults, newest, read
from nbdist.core.world import World

SAMPLES, BATCH = 80, 16


class Net(nn.Module):
    """Dropout, running statistics, a large buffer that changes rarely, draws of NumPy and of `random`."""

    def __init__(self, width=12):
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("mask", torch.ones(40_000))
        self.register_buffer("seen", torch.zeros(40_000))

    def forward(self, x):
        hidden = F.dropout(torch.relu(self.norm(self.first(x))), 0.3, self.training)
        if self.training:
            hidden = hidden + np.random.rand() * 0.1 + random.random() * 0.1
            if self.norm.num_batches_tracked % 3 == 0:
                self.seen += hidden.detach().mean()
        return self.frozen(self.last(hidden))


def wide():
    """Large enough for ranks to share its weights."""
    return Net(12_000)


def milestones(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)


def options_of(**more):
    return {
        "optimizer": ADAMW, "batch_size": BATCH, "epochs": 3, "val": classes(32, torch.float32), "metric": "accuracy",
        "accumulate": 2, **more,
    }  # fmt: skip


def stop_after(step):
    """Says stop in the `step`-th step."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= step


def rows(result):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def whole_and_halves(world, make, paths, folder, at, options):
    """The weights and history of a run, and of one that stopped and went on, in memory or from disk."""
    data = classes(SAMPLES, torch.float32)
    expected = train(world, seeded(make), data, **options)
    first = {"vaults": paths} if folder is None else {"checkpoint": folder}
    stopped, _ = train(world, seeded(make), data, stop_requested=stop_after(at), **first, **options)
    assert stopped.state == "stopped"
    then = {"vaults": paths, "go_on": True} if folder is None else {"resume": folder}
    model = seeded(make)
    if folder is not None:
        nn.init.zeros_(model.frozen.weight)
    actual = train(world, model, data, **then, **options)
    return [(rows(result), tensors) for result, tensors in (expected, actual)]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("scheduler", [milestones, plateau])
@pytest.mark.parametrize("at", [1, 5, 8, 14])
def test_a_stop_changes_no_bit(run_ranks, tmp_path, where, scheduler, at):
    """Dropout, statistics, schedulers, draws of NumPy: in the middle of an epoch, and at its end."""
    vaults = Vaults(2)
    folder = str(tmp_path) if where == "disk" else None
    options = options_of(lr_scheduler=scheduler)
    for expected, actual in run_ranks(2, whole_and_halves, Net, vaults.paths, folder, at, options):
        assert expected[0] == actual[0]
        assert_same_bits(expected[1], actual[1])
    vaults.close()
