"""Placeholders: an operation on a parameter that this rank has not, or only in part, raises."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import classes, mlp, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.comm.world import World
from nbdist.core.params.placeholder import Placeholders, detached, is_placeholder, reveal
from nbdist.errors import PlanError

READS = {
    "a norm": lambda p: p.norm(),
    "a product": lambda p: F.linear(torch.ones(1, 3), p),
    "many at once": lambda p: torch._foreach_norm([p]),
    "an update": lambda p: torch._fused_sgd_(
        [p], [torch.ones(2, 3)], [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=True,
    ),
    "an operator": lambda p: 2 * p,
    "in place": lambda p: nn.init.zeros_(p),
    "data": lambda p: p.data,
    "transposed": lambda p: p.T,
    "detached": lambda p: p.detach(),
    "a number": lambda p: float(p[0, 0]),
    "a copy": copy.deepcopy,
    "NumPy": lambda p: p.detach().numpy(),
    "a vector": lambda p: nn.utils.parameters_to_vector([p]),
    "of another function": lambda p: Given.apply(p),
}  # fmt: skip


class Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight * 2


def hidden(read):
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    Placeholders(read).hide(parameter)
    return parameter


@pytest.mark.parametrize("read", READS)
def test_whoever_computes_with_one_is_asked_about(read):
    """Through functions, methods and operators, with one parameter or many."""
    asked = []

    def refuse(parameters, _data):
        asked.extend(parameters)
        raise PlanError("not here")

    parameter = hidden(refuse)
    with pytest.raises(PlanError, match="not here"):
        READS[read](parameter)
    assert asked[0] is parameter
    assert torch.equal(torch.arange(6.0).view(2, 3), detached(parameter))


def test_what_it_is_shaped_like_is_no_secret():
    """Optimizers read shapes and gradients; a gradient may be set and read."""
    parameter = hidden(lambda *_: pytest.fail("it was read"))
    assert ((2, 3), torch.float32, True, None) == (
        parameter.shape, parameter.dtype, parameter.requires_grad, parameter.grad,
    )  # fmt: skip
    assert (2, 3) == torch.zeros_like(parameter).shape
    assert isinstance(parameter, nn.Parameter)
    torch.optim.AdamW([parameter]).step()
    parameter.grad = torch.ones(2, 3)
    parameter.grad = None
    assert "placeholder" in repr(parameter)


def test_revealed_it_is_what_it_was():
    """Its class is restored, also the user's own subclass; once revealed, it can be computed with."""

    class Special(nn.Parameter):
        pass

    def lend(parameters, _data):
        for parameter in parameters:
            reveal(parameter)

    parameter = Special(torch.ones(2))
    Placeholders(lend).hide(parameter)
    assert is_placeholder(parameter)
    assert 2.0 == float(parameter.sum())
    assert Special is type(parameter)


def error(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def penalized(model, batch):
    return error(model, batch) + 1e-2 * sum(p.square().sum() for p in model.parameters())


def penalized_before(model, batch):
    penalty = sum(p.abs().sum() for p in model.parameters())
    return penalty + error(model, batch)


def watched(model, batch):
    assert model[0].weight.mean() < 100
    assert model[3].weight.mean() < 100
    return error(model, batch)


class Greedy(torch.optim.SGD):
    """Decays all weights, also those without a gradient."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.99)
        return super().step(closure)


def refused(world, mesh, step, optimizer):
    model = mlp()
    train(
        world, model, classes(16), step=step, optimizer=optimizer(model.parameters(), 0.1), strategy=mesh, batch_size=8
    )


@pytest.mark.parametrize("step", [penalized, penalized_before, watched])
@pytest.mark.parametrize("mesh", ["pp=2", "tp=2"])
def test_a_step_that_reads_what_is_not_here(run_ranks, mesh, step):
    """For other stages' and split parameters, one sentence has the name, the mesh and the cure."""
    with pytest.raises(PlanError, match=rf"reads parameter \d.*on mesh {mesh}.* use the strategy data or shard"):
        run_ranks(2, refused, mesh, step, torch.optim.SGD)


def test_an_optimizer_that_reads_what_has_no_gradient(run_ranks):
    """It must not write to parameters that the rank does not have."""
    with pytest.raises(PlanError, match=r"the optimizer reads parameter .*on mesh pp=2"):
        run_ranks(2, refused, "pp=2", error, Greedy)


def decayed(world, options):
    model = mlp()
    train(world, model, classes(16), step=on_the_last, batch_size=8, epochs=2, shuffle=False, **options)
    return weights(model)


def on_the_last(model, batch):
    """Reads parameters that the last stage holds whole."""
    output = model(batch[0])
    return F.cross_entropy(output, batch[1]) + 1e-2 * model[3].bias.square().sum()


@pytest.mark.parametrize("options", [{"strategy": "pp=2", "microbatches": 1}, {"strategy": "tp=2"}])
def test_a_step_may_read_what_is_here(run_ranks, options):
    """A penalty on parameters that the rank holds whole is added once."""
    sgd = {"optimizer": "sgd", "lr": 0.1}
    expected = decayed(World(), sgd)
    for actual in run_ranks(2, decayed, options | sgd):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
