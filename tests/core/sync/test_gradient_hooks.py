"""Hooks on parameters see the gradient of the whole batch once a step, on any mesh, or are refused."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import SGD, seeded, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.sync.gradient_hooks import GradientHooks, check_hooks
from nbdist.errors import PlanError
from nbdist.plan import Mesh

MESHES = ["dp=2", "shard=2", "tp=2", "pp=2"]
BATCH = 16


def net():
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), torch.float64)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 8, generator=generator, dtype=torch.float64), torch.arange(64) % 2


def clamp(model):
    """A clamp, which cannot be applied to each share."""
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


def mask(model):
    """Needs the shape of the whole gradient."""
    model[0].weight.register_hook(lambda gradient: gradient * (torch.arange(16) < 4)[:, None])


def look(model):
    """Several hooks on one parameter, one of which only reads."""
    model[2].weight.register_hook(lambda gradient: None)
    model[2].weight.register_hook(torch.sign)
    model[2].weight.register_hook(lambda gradient: 0.01 * gradient)


def clamp_after(model):
    """A post-accumulate hook that changes the gradient in place."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(clamp_gradient)


def clamp_gradient(parameter):
    parameter.grad.clamp_(-0.01, 0.01)


def other_after(model):
    """A hook that replaces the gradient by another tensor."""
    model[0].weight.register_post_accumulate_grad_hook(sign_gradient)


def sign_gradient(parameter):
    parameter.grad = 0.01 * parameter.grad.sign()


def update_after(model):
    """A hook that makes the update itself and leaves nothing for the optimizer."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)


def update(parameter):
    with torch.no_grad():
        parameter.sub_(parameter.grad.sign(), alpha=0.01)
    parameter.grad = None


BEFORE = [clamp, mask, look]
AFTER = [clamp_after, other_after, update_after]


def plain(register, clip_norm=None):
    """A plain training loop over whole batches."""
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
    """The result is that of a plain training loop."""
    options = {"strategy": mesh, "accumulate": 1 if mesh == "pp=2" else 2}
    for found in run_ranks(2, functools.partial(trained, **options), register):
        torch.testing.assert_close(found, plain(register), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2"])
@pytest.mark.parametrize("register", AFTER)
def test_a_hook_after_the_accumulation_sees_the_whole_gradient(run_ranks, register, mesh):
    """It may change the gradient, replace it, or set it to None."""
    for found in run_ranks(2, functools.partial(trained, strategy=mesh), register):
        torch.testing.assert_close(found, plain(register), rtol=0, atol=1e-12)


@pytest.mark.parametrize("register", AFTER)
def test_a_hook_after_the_accumulation_on_each_channel(run_on_each_channel, register):
    """With shared weights, the owner of a parameter runs its hook, for all ranks."""
    for found in run_on_each_channel(2, functools.partial(trained, strategy="dp=2"), register):
        torch.testing.assert_close(found, plain(register), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"clip_norm": 0.05}, {"reproducible": 4}, {"precision": "fp16"}])
def test_hooks_run_with_every_kind_of_sync(run_ranks, options):
    """Hooks run before clipping, with `--reproducible`, and after fp16 unscaling."""
    for found in run_ranks(2, functools.partial(trained, strategy="dp=2", **options), clamp):
        torch.testing.assert_close(found, plain(clamp, options.get("clip_norm")), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mesh", ["shard=2", "tp=2"])
def test_a_hook_that_would_get_a_part_is_refused(run_ranks, mesh):
    """A post-accumulate hook cannot get the whole of a parameter that is split over ranks."""
    with pytest.raises(PlanError, match=r"parameter 0\.weight has a post-accumulate-grad hook, .*use register_hook"):
        run_ranks(2, functools.partial(trained, strategy=mesh), clamp_after)


def hook_of_the_optimizer(world, mesh):
    def optimizer(parameters):
        made = SGD(parameters)
        made.register_step_pre_hook(lambda *_: None)
        return made

    return train(world, net(), data(), optimizer=optimizer, batch_size=BATCH, strategy=mesh)[1]


@pytest.mark.parametrize("mesh", ["shard=2", "tp=2", "pp=2"])
def test_an_optimizer_hook_on_a_mesh_is_refused(run_ranks, mesh):
    """It might use all parameters together; the user's step() can be tried on small tensors, a hook cannot."""
    with pytest.raises(PlanError, match="the optimizer has step hooks"):
        run_ranks(2, hook_of_the_optimizer, mesh)


def test_hooks_are_restored_after_the_run():
    """The same dicts are restored: the hooks' handles remove from them."""
    model = net()
    handles = [model[0].weight.register_hook(torch.sign), model[0].bias.register_post_accumulate_grad_hook(update)]
    hooks = GradientHooks(model)
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    assert model[0].weight.grad.abs().min() < 1, "no sign was taken"
    assert model[0].bias.grad is not None, "no update took it"
    hooks.restore()
    assert [torch.sign] == list(model[0].weight._backward_hooks.values())
    assert [update] == list(model[0].bias._post_accumulate_grad_hooks.values())
    for handle in handles:
        handle.remove()
    assert not model[0].weight._backward_hooks
    assert not model[0].bias._post_accumulate_grad_hooks


def test_a_hook_of_several_tensors_is_refused():
    """It runs inside a backward only, and said so in an assertion of torch's."""
    model = net()
    torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), lambda gradients: None)
    with pytest.raises(PlanError, match=r"register_multi_grad_hook, which runs inside a backward only"):
        check_hooks(model, [], Mesh())
