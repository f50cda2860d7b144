"""Steps that call parts of one model, and never the model: on every mesh as in a plain loop."""

from __future__ import annotations

import math
import re

import pytest
import torch
from problems import classes, seeded, train_task
from torch import nn
from torch.nn import functional as F

from nbdist.core.task.modules import OneModule
from nbdist.core.task.own_loop import calls_parts_only
from nbdist.core.task.task import Task

DATA, VAL = classes(40), classes(20)


class Autoencoder(nn.Module):
    """Has no forward of its own, as many in published programs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6))
        self.scale = nn.Parameter(torch.ones(()))

    def rebuilt(self, x):
        return self.scale * self.decoder(self.encoder(x))


def step(model, batch):
    x = batch[0]
    return F.mse_loss(model.rebuilt(x), x) + 0.01 * model.encoder(x).square().mean()


def run(world, mesh):
    model = seeded(Autoencoder, torch.float64)
    task = Task.create(model, DATA, step=step, val=VAL, optimizer="adamw", lr=0.01, batch_size=8, shuffle=False)
    options = {"split_at": "decoder"} if "pp" in mesh else {}
    result = train_task(world, task, strategy=mesh, epochs=2, **options)
    return result.history, model.state_dict()


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2", "shard=2", "tp=2", "pp=2", "dp=2,shard=2"])
def test_a_step_may_call_the_parts_of_a_model(run_ranks, mesh):
    """Weights under their own names, and the loss of evaluations."""
    model = seeded(Autoencoder, torch.float64)
    optimizer, val = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(2):
        for x in DATA[0].split(8):
            optimizer.zero_grad()
            step(model, (x,)).backward()
            optimizer.step()
        with torch.no_grad():
            val.append(step(model, VAL).item())
    for history, trained in run_ranks(math.prod(map(int, re.findall(r"\d", mesh))), run, mesh):
        torch.testing.assert_close(trained, model.state_dict(), rtol=1e-9, atol=1e-11)
        assert [row["val_loss"] for row in history] == pytest.approx(val, rel=1e-9)


def calls(model, batch):
    return F.mse_loss(model(batch[0]), batch[0])


def hands_on(model, batch):
    return calls(model, batch)


def through_a_lambda(model, batch):
    return (lambda: model.forward(batch[0]))()


def inside_a_lambda(model, batch):
    return (lambda: model.decoder(model.encoder(batch[0])))().mean()


def ignores(model, batch):
    return batch[0].mean()


def by_items(model, batch):
    return model["encoder"](batch[0]).mean() + model["decoder"](batch[0]).mean()


class CallsItself(Autoencoder):
    def forward(self, x):
        return self.rebuilt(x)

    def loss_of(self, x):
        return self(x).mean()


def by_a_method(model, batch):
    return model.loss_of(batch[0])


@pytest.mark.parametrize(
    ("kind", "function", "parts"),
    [
        (Autoencoder, step, True), (Autoencoder, inside_a_lambda, True), (Autoencoder, calls, False),
        (Autoencoder, hands_on, False), (Autoencoder, through_a_lambda, False), (Autoencoder, ignores, False),
        (CallsItself, by_a_method, False), (Autoencoder, by_items, True), (Autoencoder, len, False),
    ],
)  # fmt: skip
def test_a_step_is_known_by_its_code(kind, function, parts):
    """It is not called for it."""
    assert parts is calls_parts_only(function, kind())


def test_both_roots_are_one_module():
    """Modes, and whatever replaces a submodule, are those of both."""
    model = Autoencoder()
    root = OneModule(model, step)
    assert dict(root.named_parameters()).keys() == dict(model.named_parameters()).keys()
    root.eval()
    assert [False, False] == [model.training, model.encoder.training]
    model.decoder = nn.Identity()
    assert isinstance(root.get_submodule("decoder"), nn.Identity)
