"""Optimizers with two modes, as schedule-free ones: they train other weights than they evaluate."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from problems import FEATURES, classes, seeded, train, weights
from torch import nn
from torch.nn import functional as F

BATCH, STEPS = 8, 4


class Averaging(torch.optim.Optimizer):
    """As SGDScheduleFree: between the fast weights and their average in training, the average in evaluation."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "training": False})

    def _switch(self, training):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                        with torch.no_grad():
                            p.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["training"], "not in train mode"
            group["k"] += 1
            c = 1 / group["k"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, c)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - c) - 1))
                z.sub_(p.grad, alpha=group["lr"])


def model():
    return seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 4)), torch.float64)


class Scored:
    """A step that logs a score, of which the first epoch's is best."""

    def __init__(self):
        self.calls = 0

    def __call__(self, net, batch):
        x, y = batch
        self.calls += 1
        return F.cross_entropy(net(x), y), {"score": -float((self.calls - 1) // STEPS)}


def kept(world, epochs, options):
    data = classes(STEPS * BATCH * world.size)
    given = {"optimizer": Averaging, "batch_size": BATCH * world.size, "check": "no", "epochs": epochs, **options}
    return train(world, model(), data, step=Scored(), **given)[1]


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2"])
def test_the_best_epoch_is_kept_as_it_was_evaluated(run_ranks, mesh):
    """Not as it was trained."""
    best = run_ranks(2, kept, 1, {"strategy": mesh})[0]
    found = run_ranks(2, kept, 3, {"strategy": mesh, "keep_best": "score"})[0]
    torch.testing.assert_close(found, best, rtol=1e-12, atol=1e-14)


def by_hand():
    net, (x, y) = model(), classes(STEPS * BATCH)
    optimizer = Averaging(net.parameters())
    optimizer.train()
    for rows in torch.arange(len(x)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.eval()
    loss = F.cross_entropy(net(classes(16)[0]), classes(16)[1]).item()
    return loss, weights(net)


def run(world, strategy):
    result, found = train(
        world, model(), classes(STEPS * BATCH), optimizer=Averaging, batch_size=BATCH, shuffle=False, epochs=1,
        val=classes(16), strategy=strategy,
    )  # fmt: skip
    return result.history[-1]["val_loss"], copy.deepcopy(found)


@pytest.mark.parametrize("strategy", ["data", "shard", "tensor"])
def test_evaluation_and_the_trained_model_have_the_evaluated_weights(run_ranks, strategy):
    """And each step the trained ones, as if the user had called ``train()`` and ``eval()``."""
    expected_loss, expected = by_hand()
    for loss, found in run_ranks(2, functools.partial(run, strategy=strategy)):
        assert expected_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
