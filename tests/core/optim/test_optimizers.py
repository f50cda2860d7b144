"""Optimizers by name, by callable, ready-made."""

from __future__ import annotations

import copy
import functools
import threading
import types

import pytest
import torch
from problems import mlp
from torch import nn

from nbdist.core.optim.cut_trial import differs
from nbdist.core.optim.optimizers import BY_ELEMENT, OPTIMIZERS, check_may_be_cut, make_optimizer, optimizer_name
from nbdist.core.optim.state import told_entry
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh


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


class Lars(torch.optim.SGD):
    """Scales each update by norms of the whole tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(p.norm() / p.grad.norm())
        return super().step(closure)


class Unit(torch.optim.SGD):
    """Sets weights to directions of whole gradients; calls no method of another class's."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / p.grad.norm())


class Clipped(torch.optim.SGD):
    """Clips by the norm over all tensors."""

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        return super().step(closure)


class Growing(torch.optim.SGD):
    """Estimates one rate from sums over all tensors, first from next to nothing: as Prodigy and D-Adaptation do."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.rate, self.begun = 1e-9, {}

    @torch.no_grad()
    def step(self, closure=None):
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        come = sum(((self.begun.setdefault(p, p.clone()) - p) * p.grad).sum() for p in tensors)
        self.rate = max(self.rate, float(come / sum(p.grad.abs().sum() for p in tensors)))
        for group in self.param_groups:
            group["lr"] = self.rate
        return super().step(closure)


class Factored(torch.optim.SGD):
    """Has factors of a matrix in place of all its moments, if it is large enough, after some steps."""

    def __init__(self, params, lr, min_size, start):
        super().__init__(params, lr)
        self.start, self.steps = start, 0
        for group in self.param_groups:
            group["min_size"] = min_size

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.ndim == 2 and min(p.shape) >= group["min_size"] and self.steps > self.start:
                    p.grad.div_(p.grad.square().mean(-1, keepdim=True).sqrt())
        return super().step(closure)


class Noting(torch.optim.SGD):
    """Keeps an object of its own in the state of each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["notes"] = types.SimpleNamespace()
        return super().step(closure)


class Shared(torch.optim.SGD):
    """Keeps something for all parameters in its state."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.state["steps"] = 0

    def step(self, closure=None):
        self.state["steps"] += 1
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Counts its calls, and has what cannot be copied."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.calls, self.lock = 0, threading.Lock()

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.05 / self.calls
        return super().step(closure)


def shapes():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Conv2d(2, 3, 3), nn.Conv3d(1, 2, 1), nn.Linear(8, 3))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model


def stepped(parameters):
    made = torch.optim.Adam(parameters, 1e-5, amsgrad=True)
    for p in made.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    made.step()
    return made


def grouped(parameters):
    first, second, *rest = parameters
    groups = [{"params": [first], "lr": 0.0}, {"params": [second], "weight_decay": 0.5}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.01))


def stepping_as(kind, parameters):
    made = torch.optim.SGD(parameters, 0.1)
    made.step = types.MethodType(kind.step, made)
    return made


def scheduled(parameters):
    made = torch.optim.SGD(parameters, 0.1)
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, step / 10))
    return made


OF_TORCH = [
    functools.partial(OPTIMIZERS[name], **how)
    for name in sorted(set(OPTIMIZERS) - {"adafactor", "muon"})
    for how in ({}, {"foreach": True}, *([{"fused": True}] if name in ("adagrad", "adam", "adamw", "sgd") else []))
]


@pytest.mark.parametrize(
    "make", [*OF_TORCH, stepped, grouped, scheduled, lambda ps: Counting(ps, 0.1), lambda ps: Shared(ps, 0.1)]
)
def test_what_treats_each_element_by_itself_may_be_cut(make):
    """All of torch's kind, with groups, state, a schedule or attributes of its own; it is left as it was."""
    model = shapes()
    optimizer = make(list(model.parameters()))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), vars(optimizer).get("calls")))
    random = torch.get_rng_state()
    assert "" == differs(optimizer, flat=True, along=True, apart=False, told=True)
    assert "" == differs(optimizer, flat=False, along=False, apart=True, told=True)
    assert torch.equal(random, torch.get_rng_state())
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict(), vars(optimizer).get("calls")), before)


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (torch.optim.Adafactor, ("shard=2", "tp=2")),
        (lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2]), ("shard=2", "tp=2")),
        (lambda ps: Lars(ps, 0.1), ("shard=2", "tp=2")),
        (lambda ps: Lars(ps, 0.0), ("shard=2", "tp=2")),
        (lambda ps: Lars(ps, torch.tensor(0.0)), ("shard=2", "tp=2")),
        (lambda ps: stepping_as(Unit, ps), ("shard=2", "tp=2")),
        (lambda ps: Growing(ps, 0.1), ("shard=2", "tp=2", "pp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=16, start=0), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=64, start=0), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=1, start=25), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=1, start=50), ("shard=2", "tp=2")),
        (lambda ps: Clipped(ps, 0.1), ("shard=2", "tp=2", "pp=2")),
    ],
)
def test_what_looks_at_more_than_an_element_is_found_out(make, refused):
    """By trying it: norms of a tensor or of all, factored moments, orthogonal updates."""
    optimizer = make(list(shapes().parameters()))
    for mesh in ("shard=2", "tp=2", "pp=2"):
        parsed = Mesh.parse(mesh, 2)
        if mesh in refused:
            name = type(optimizer).__name__
            with pytest.raises(PlanError, match=f"optimizer {name} .*tensor.*which mesh {mesh} .*use another one"):
                check_may_be_cut(optimizer, parsed)
        else:
            check_may_be_cut(optimizer, parsed)


@pytest.mark.parametrize("mesh", [Mesh(shard=2), Mesh(tp=2), Mesh(pp=2)])
def test_a_state_that_cannot_come_home_is_refused_before_the_first_step(mesh):
    """One rank cannot tell another of an object; where nobody wants it, it may be there."""
    optimizer = Noting(shapes().parameters(), 0.1)
    check_may_be_cut(optimizer, mesh)
    with pytest.raises(PlanError, match=r"keeps a SimpleNamespace in its state, 'notes', which mesh .*use anoth"):
        check_may_be_cut(optimizer, mesh, comes_home=True)


@pytest.mark.parametrize(("entry", "value"), [("notes", object()), ("phase", torch.tensor([1j])), (1, 2.0)])
def test_what_a_rank_cannot_tell_another_is_said_in_a_sentence(entry, value):
    """A state may come to hold such a thing later than anybody looks for it."""
    with pytest.raises(TaskError, match=r"the optimizer.*(object|complex|under 1)"):
        told_entry(entry, value)


def test_optimizers_whose_elements_go_by_themselves_are_known():
    """Those that the trial finds so, of all that torch has: they begin at once."""
    assert {make.func for make in OF_TORCH} >= BY_ELEMENT
