"""Hooks on parameters see the gradient of the whole batch once a step, on any mesh, or are refused."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import SGD, seeded, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.errors import PlanError

MESHES = ["dp=2", "shard=2", "tp=2", "pp=2"]
BATCH = 16


def net():
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), torch.float64)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 8, generator=generator, dtype=torch.float64), torch.arange(64) % 2


def clamp(model):
    """As nobody could of shares: a clamp."""
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def mask(model):
    """It knows the shape of the whole."""
    model[0].weight.register_hook(lambda gradient: gradient * (torch.arange(16) < 4)[:, None])


def look(model):
    """Several on one parameter, one of which only looks."""
    model[2].weight.register_hook(lambda gradient: None)
    model[2].weight.register_hook(torch.sign)
    model[2].weight.register_hook(lambda gradient: 0.01 * gradient)


def clamp_after(model):
    """In place, after the gradient is accumulated."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(clamp_gradient)


def clamp_gradient(parameter):
    parameter.grad.clamp_(-0.01, 0.01)


def other_after(model):
    """Another tensor in the place of the gradient."""
    model[0].weight.register_post_accumulate_grad_hook(sign_gradient)


def sign_gradient(parameter):
    parameter.grad = 0.01 * parameter.grad.sign()


def update_after(model):
    """The update itself, with nothing left for the optimizer."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)


def update(parameter):
    with torch.no_grad():
        parameter.sub_(parameter.grad.sign(), alpha=0.01)
    parameter.grad = None


BEFORE = [clamp, mask, look]
AFTER = [clamp_after, other_after, update_after]


def plain(register, clip_norm=None):
    """A loop by hand over whole batches."""
    model, (x, y) = net(), data()
    optimizer = SGD(model.parameters())
    register(model)
    for start in range(0, 64, BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH]).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return weights(model)


def trained(world, register, **options):
    model = net()
    register(model)
    _, found = train(world, model, data(), optimizer=SGD, batch_size=BATCH, shuffle=False, **options)
    return found


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("register", BEFORE)
def test_a_hook_sees_the_whole_gradient(run_ranks, register, mesh):
    """What it makes of it is what a loop by hand makes of it."""
    options = {"strategy": mesh, "accumulate": 1 if mesh == "pp=2" else 2}
    for found in run_ranks(2, functools.partial(trained, **options), register):
        torch.testing.assert_close(found, plain(register), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2"])
@pytest.mark.parametrize("register", AFTER)
def test_a_hook_after_the_accumulation_sees_the_whole_gradient(run_ranks, register, mesh):
    """It may change it, put another one in its place, or leave none."""
    for found in run_ranks(2, functools.partial(trained, strategy=mesh), register):
        torch.testing.assert_close(found, plain(register), rtol=0, atol=1e-12)


@pytest.mark.parametrize("register", AFTER)
def test_a_hook_after_the_accumulation_on_each_channel(run_on_each_channel, register):
    """Where ranks share the weights, the one that owns a parameter runs it, for all."""
    for found in run_on_each_channel(2, functools.partial(trained, strategy="dp=2"), register):
        torch.testing.assert_close(found, plain(register), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"clip_norm": 0.05}, {"reproducible": 4}, {"precision": "fp16"}])
def test_hooks_go_with_every_way_to_sum(run_ranks, options):
    """Before clipping, as backward comes before it; where bits depend on no number of ranks; and after unscaling."""
    for found in run_ranks(2, functools.partial(trained, strategy="dp=2", **options), clamp):
        torch.testing.assert_close(found, plain(clamp, options.get("clip_norm")), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mesh", ["shard=2", "tp=2"])
def test_a_hook_that_would_see_a_part_is_refused(run_ranks, mesh):
    """A parameter of which a rank holds a part cannot be shown whole."""
    with pytest.raises(PlanError, match=r"parameter 0\.weight has a hook that runs after .*use register_hook, or"):
        run_ranks(2, functools.partial(trained, strategy=mesh), clamp_after)


def hook_of_the_optimizer(world, mesh):
    def optimizer(parameters):
        made = SGD(parameters)
        made.register_step_pre_hook(lambda *_: None)
        return made

    return train(world, net(), data(), optimizer=optimizer, batch_size=BATCH, strategy=mesh)[1]


@pytest.mark.parametrize("mesh", ["shard=2", "tp=2", "pp=2"])
def test_a_hook_of_the_optimizer_that_would_see_some_is_refused(run_ranks, mesh):
    """It might look at all parameters together; a step of the user's own can be tried, a hook cannot."""
    with pytest.raises(PlanError, match="the optimizer has hooks around its step"):
        run_ranks(2, hook_of_the_optimizer, mesh)


def test_hooks_are_back_when_the_run_has_ended():
    """The same dicts, from which their handles remove them."""
    model = net()
    handles = [model[0].weight.register_hook(torch.sign), model[0].bias.register_post_accumulate_grad_hook(update)]
    hooks = GradientHooks(model)
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    assert model[0].weight.grad.abs().min() < 1, "no sign was taken"
    assert model[0].bias.grad is not None, "no update took it"
    hooks.put_back()
    assert [torch.sign] == list(model[0].weight._backward_hooks.values())
    assert [update] == list(model[0].bias._post_accumulate_grad_hooks.values())
    for handle in handles:
        handle.remove()
    assert not model[0].weight._backward_hooks
    assert not model[0].bias._post_accumulate_grad_hooks
