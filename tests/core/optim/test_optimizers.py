"""Optimizers by name, by callable, ready-made; which of them can be sharded."""

from __future__ import annotations

import copy
import functools
import threading
import types

import pytest
import torch
from problems import mlp
from torch import nn

from nbdist.core.optim.optimizers import ELEMENTWISE, OPTIMIZERS, check_can_be_sharded, make_optimizer, optimizer_name
from nbdist.core.optim.shardability import differs
from nbdist.core.optim.state import entry_to_json
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_name_makes_an_optimizer_that_steps(name):
    """Each class of torch.optim that needs no closure and no sparse gradients has its name."""
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
def test_what_torch_would_refuse_is_reported_in_a_sentence(name, lr, error, message):
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
    """A callable that takes the parameters and an lr."""
    assert 0.3 == make_optimizer(made, mlp(), 0.3).defaults["lr"]


def test_frozen_parameters_are_not_optimized():
    """The optimizer holds the trainable parameters only."""
    model = mlp()
    model[0].requires_grad_(False)
    (group,) = make_optimizer("sgd", model, None).param_groups
    assert [id(p) for p in model[3].parameters()] == [id(p) for p in group["params"]]


def test_a_ready_optimizer_stays_itself():
    """It is used as it is, with the user's groups and state."""
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}], lr=0.1)
    assert optimizer is make_optimizer(optimizer, model, None)


def test_named_optimizers_are_fused_where_torch_can():
    """Fused kernels are the default by name; the user's own optimizer, or one that cannot be fused, is not changed."""
    for name in ("adam", "adamw", "sgd"):
        assert make_optimizer(name, mlp(), None).defaults["fused"]
        assert not make_optimizer(OPTIMIZERS[name], mlp(), None).defaults["fused"]
    whole = torch.nn.Module()
    whole.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert not make_optimizer("adam", whole, None).defaults["fused"]


class Lars(torch.optim.SGD):
    """Scales each update by the norms of a whole tensor."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(p.norm() / p.grad.norm())
        return super().step(closure)


class Unit(torch.optim.SGD):
    """Normalizes whole gradients; it does not inherit its step."""

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


class Outward(torch.optim.SGD):
    """Takes other steps once the norms of all parameters and of all gradients have grown, as an adaptive rate does."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.norms = None

    @torch.no_grad()
    def step(self, closure=None):
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = [sum(float(t.norm()) ** 2 for t in both) ** 0.5 for both in (tensors, [p.grad for p in tensors])]
        if self.norms is not None and all(map(float.__gt__, norms, self.norms)):
            largest = (norms[0] - self.norms[0]) / (norms[1] - self.norms[1])
            for group in self.param_groups:
                group["lr"] = min(group["lr"], largest)
        self.norms = norms
        return super().step(closure)


class Curved(torch.optim.SGD):
    """Divides by the change of a tensor's gradient over the length of its step, where that is above 1, like Apollo."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if state:
                change = float((p.grad - state["grad"]).norm() / (p - state["at"]).norm())
                state["curvature"] += 0.1 * (change - state["curvature"])
            state.setdefault("curvature", torch.zeros(()))
            state["grad"], state["at"] = p.grad.clone(), p.clone()
            p.grad /= max(1.0, float(state["curvature"]))
        return super().step(closure)


class Growing(torch.optim.SGD):
    """Estimates one rate from sums over all tensors, starting near zero, like Prodigy and D-Adaptation."""

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
    """Factors the second moment of large enough matrices, after some steps, like Adafactor."""

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
    """Has a non-tensor object in the state of each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["notes"] = types.SimpleNamespace()
        return super().step(closure)


class Shared(torch.optim.SGD):
    """Has a state entry that belongs to all parameters."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.state["steps"] = 0

    def step(self, closure=None):
        self.state["steps"] += 1
        return super().step(closure)


class Counting(torch.optim.SGD):
    """Counts its calls, and has an attribute that cannot be copied."""

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
    """Element-wise ones of torch, with groups, state, a scheduler or own attributes; the trial does not change them."""
    model = shapes()
    optimizer = make(list(model.parameters()))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), vars(optimizer).get("calls")))
    random = torch.get_rng_state()
    assert "" == differs(optimizer, flat=True, along=True, apart=False, sent=True)
    assert "" == differs(optimizer, flat=False, along=False, apart=True, sent=True)
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
        (lambda ps: Outward(ps, 0.01), ("shard=2", "tp=2", "pp=2")),
        (lambda ps: Curved(ps, 0.01), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=16, start=0), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=64, start=0), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=1, start=25), ("shard=2", "tp=2")),
        (lambda ps: Factored(ps, 0.1, min_size=1, start=50), ("shard=2", "tp=2")),
        (lambda ps: Clipped(ps, 0.1), ("shard=2", "tp=2", "pp=2")),
    ],
)
def test_what_looks_at_more_than_an_element_is_found_out(make, refused):
    """The trial detects norms of a tensor or of all, factored moments, orthogonal updates."""
    optimizer = make(list(shapes().parameters()))
    for mesh in ("shard=2", "tp=2", "pp=2"):
        parsed = Mesh.parse(mesh, 2)
        if mesh in refused:
            name = type(optimizer).__name__
            with pytest.raises(PlanError, match=f"optimizer {name} .*tensor.*which mesh {mesh} .*use another one"):
                check_can_be_sharded(optimizer, parsed)
        else:
            check_can_be_sharded(optimizer, parsed)


@pytest.mark.parametrize("mesh", [Mesh(shard=2), Mesh(tp=2), Mesh(pp=2)])
def test_a_state_that_cannot_be_gathered_is_refused_before_the_first_step(mesh):
    """An object in the state cannot be sent to another rank; it is allowed if the state is not gathered."""
    optimizer = Noting(shapes().parameters(), 0.1)
    check_can_be_sharded(optimizer, mesh)
    with pytest.raises(PlanError, match=r"keeps a SimpleNamespace in its state, 'notes', which mesh .*use anoth"):
        check_can_be_sharded(optimizer, mesh, gathered=True)


@pytest.mark.parametrize(("entry", "value"), [("notes", object()), ("phase", torch.tensor([1j])), (1, 2.0)])
def test_an_entry_that_cannot_be_sent_is_named_in_a_sentence(entry, value):
    """Such an entry may appear only after the trial."""
    with pytest.raises(TaskError, match=r"the optimizer.*(object|complex|under 1)"):
        entry_to_json(entry, value)


def test_elementwise_optimizers_are_known():
    """The trial accepts each of them, so that they can skip it."""
    assert {make.func for make in OF_TORCH} >= ELEMENTWISE
