"""Steps that update two modules with an optimizer each, on a cluster: in place, and after failures to the same bits."""

from __future__ import annotations

import functools
import os
import re
import signal

import pytest
import torch
from gate import Gate
from problems import ADAMW, classes, seeded
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.errors import EngineError

OPTIONS = {"batch_size": 16, "shuffle": False, "epochs": 3, "check": "no"}


def pair():
    """Two modules, always the same ones."""
    return {
        "d": seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.float64),
        "g": seeded(functools.partial(nn.Linear, 3, 6), torch.float64),
    }


def gan(model, batch, between=lambda: None):
    """A step of a GAN that draws its noise."""
    fake = model["g"](torch.randn(len(batch[0]), 3, dtype=torch.float64))
    real, made = model["d"](batch[0]), model["d"](fake.detach())
    nbdist.update(F.softplus(-real).mean() + F.softplus(made).mean(), "d")
    between()
    nbdist.update(F.softplus(-model["d"](fake)).mean(), "g")


def weights_of(modules):
    return {f"{name}.{key}": t.clone() for name, module in modules.items() for key, t in module.state_dict().items()}


def undisturbed(cluster, **options):
    modules = pair()
    run = cluster.train(modules, classes(64), step=gan, optimizer={"d": ADAMW, "g": ADAMW}, **OPTIONS | options)
    return weights_of(modules), run


def test_the_users_own_modules_and_optimizers_are_trained(cluster):
    """In place, with their state; the average of the weights has their form."""
    modules = pair()
    own = {name: ADAMW(module.parameters()) for name, module in modules.items()}
    run = cluster.train(modules, classes(64), step=gan, optimizer=own, ema=0.5, **OPTIONS)
    expected, other = undisturbed(cluster)
    torch.testing.assert_close(weights_of(modules), expected, rtol=0, atol=0)
    assert other.history[-1]["loss_d"] == run.history[-1]["loss_d"]
    for name, module in modules.items():
        assert {*own[name].state} == {*module.parameters()}
        assert {12.0} == {float(state["step"]) for state in own[name].state.values()}
        assert run.ema[name].keys() == module.state_dict().keys()
    assert "d: AdamW, g: AdamW" == run.plan.optimizer


def test_an_engine_that_is_killed_between_two_updates(cluster, tmp_path):
    """The step is done again, as a whole: the same bits."""
    expected, _ = undisturbed(cluster)
    gate, calls, modules = Gate(tmp_path), [], pair()

    def held(model, batch):
        calls.append(1)
        gan(model, batch, between=lambda: gate.hold("between") if len(calls) == 5 else None)

    options = {"optimizer": {"d": ADAMW, "g": ADAMW}, **OPTIONS}
    run = cluster.train(modules, classes(64), step=held, background=True, **options)
    gate.wait("between", run=run)
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    gate.open()
    assert "finished" == run.wait().state
    torch.testing.assert_close(weights_of(modules), expected, rtol=0, atol=0)


def test_an_error_between_two_updates(cluster):
    """The model holds the newest step that was kept whole, not the half of one."""
    calls, modules = [], pair()

    def failing():
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("torn")

    step = functools.partial(gan, between=failing)
    with pytest.raises(EngineError, match="ValueError: torn") as caught:
        cluster.train(modules, classes(64), step=step, optimizer={"d": ADAMW, "g": ADAMW}, **OPTIONS)
    kept = int(re.search(r"The model holds the weights after step (\d), ", str(caught.value))[1])
    assert 1 <= kept <= 4
    expected, _ = undisturbed(cluster, epochs=None, steps=kept)
    torch.testing.assert_close(weights_of(modules), expected, rtol=0, atol=0)
