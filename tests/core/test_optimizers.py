"""Optimizers by name, by callable, ready-made."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import mlp

from nbdist.core.optimizers import OPTIMIZERS, make_optimizer, optimizer_name
from nbdist.errors import PlanError, TaskError


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_name_makes_an_optimizer_that_steps(name):
    """Each class of torch.optim that needs no closure and no sparse gradient goes by its name."""
    model = torch.nn.Linear(2, 2, bias=False)  # muon takes matrices only
    before = model.weight.clone()
    optimizer = make_optimizer(name.upper(), model, 0.1)
    model(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()
    assert 0.1 == optimizer.defaults["lr"]
    assert not torch.equal(before, model.weight)
    assert name == optimizer_name(name.upper())


@pytest.mark.parametrize(
    ("name", "lr", "error", "message"),
    [
        ("sgd", -1.0, PlanError, r"lr -1\.0 must be a positive number"),
        ("sgd", float("nan"), PlanError, "lr nan must be a positive number"),
        ("sgd", "fast", PlanError, "lr fast must be a positive number"),
        ("muon", None, TaskError, "optimizer muon cannot train this model: .*2D"),
    ],
)
def test_what_torch_would_refuse_is_said_in_a_sentence(name, lr, error, message):
    """A rate or a model that an optimizer cannot take."""
    with pytest.raises(error, match=message):
        make_optimizer(name, mlp(), lr)


@pytest.mark.parametrize(
    "made",
    [
        functools.partial(torch.optim.SGD, momentum=0.9),
        torch.optim.SGD,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
        lambda parameters, **settings: torch.optim.SGD(parameters, **settings),
    ],
)
def test_a_callable_gets_the_rate(made):
    """Whatever takes the parameters and an lr."""
    assert 0.3 == make_optimizer(made, mlp(), 0.3).defaults["lr"]


def test_frozen_parameters_are_not_optimized():
    """The optimizer holds what is trained and nothing else."""
    model = mlp()
    model[0].requires_grad_(False)
    (group,) = make_optimizer("sgd", model, None).param_groups
    assert [id(p) for p in model[3].parameters()] == [id(p) for p in group["params"]]


def test_a_ready_optimizer_stays_itself():
    """Its groups and its state are the user's."""
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}], lr=0.1)
    assert optimizer is make_optimizer(optimizer, model, None)


def test_named_optimizers_are_fused_where_torch_can():
    """One kernel for the whole update; what the user made stays as it was made, and so does what cannot be fused."""
    for name in ("adam", "adamw", "sgd"):
        assert make_optimizer(name, mlp(), None).defaults["fused"]
        assert not make_optimizer(OPTIMIZERS[name], mlp(), None).defaults["fused"]
    whole = torch.nn.Module()
    whole.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert not make_optimizer("adam", whole, None).defaults["fused"]
