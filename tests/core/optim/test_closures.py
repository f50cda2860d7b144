"""Optimizers whose step needs a closure: they compute the loss again, over all ranks, with strategy data."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import assert_same_bits, classes, mlp, train, weights
from torch.nn import functional as F

from nbdist.core.comm.world import World
from nbdist.core.optim.closures import needs_closure
from nbdist.errors import PlanError, TaskError

STEPS, BATCH = 4, 8
LBFGS = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=4)


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as users write it; only an assertion tells that a closure is needed."""

    def __init__(self, params, lr=0.1, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "a closure is required"
        every = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in every]).norm()
        for p in every:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * 0.05 / norm)
        with torch.enable_grad():
            closure()
        for p in every:
            p.data = self.state[p]["old"]
            p.sub_(p.grad, alpha=0.1)


class Required(torch.optim.SGD):
    def step(self, closure):
        closure()
        super().step()


MADE = {"LBFGS": LBFGS, "asserted": Sharpness, "in the signature": functools.partial(Required, lr=0.1)}


def by_hand(make, slices, clip_norm):
    """Steps in one process, each of which computes the gradients before it too."""
    model, (x, y) = mlp(), classes(STEPS * BATCH)
    optimizer = make(model.parameters())
    for rows in torch.arange(len(x)).split(BATCH):

        def closure(rows=rows):
            optimizer.zero_grad()
            total = 0
            for part in rows.chunk(slices):
                loss = F.cross_entropy(model(x[part]), y[part]) * len(part) / len(rows)
                loss.backward()
                total = total + loss.detach()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            return total

        closure()
        optimizer.step(closure)
    return weights(model)


def run(world, kind, **options):
    _, found = train(
        world, mlp(), classes(STEPS * BATCH), optimizer=MADE[kind], batch_size=BATCH, shuffle=False, **options
    )
    return found


@pytest.mark.parametrize("clip_norm", [None, 0.2])
@pytest.mark.parametrize("kind", MADE)
def test_a_closure_computes_the_loss_of_all_ranks(run_ranks, kind, clip_norm):
    """The weights are those of one process that computes the same slices, clipped as they are."""
    expected = by_hand(MADE[kind], 2, clip_norm)
    for found in run_ranks(2, functools.partial(run, kind=kind, clip_norm=clip_norm)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_loss_of_a_step_is_that_before_it():
    """What closures compute within the step is not in the history."""
    result, _ = train(
        World(), mlp(), classes(BATCH), optimizer=LBFGS, batch_size=BATCH, shuffle=False, steps=1, accumulate=2
    )
    x, y = classes(BATCH)
    assert F.cross_entropy(mlp()(x), y).item() == pytest.approx(result.history[0]["loss"], rel=1e-12)


@pytest.mark.parametrize("strategy", ["shard", "pipeline", "tensor"])
@pytest.mark.parametrize("kind", MADE)
def test_a_mesh_that_splits_the_model_refuses_a_closure(run_ranks, kind, strategy):
    """In one sentence, with the strategy on which it works."""
    with pytest.raises(PlanError, match=r"needs a closure, to compute the loss again .*or the strategy data"):
        run_ranks(2, functools.partial(run, kind=kind, strategy=strategy))


def test_an_error_of_a_step_is_no_need_of_a_closure():
    """It is raised as it is."""

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("broken")

    assert not needs_closure(Broken(mlp().parameters()))
    with pytest.raises(ValueError, match="broken"):
        train(World(), mlp(), classes(BATCH), optimizer=Broken, batch_size=BATCH)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_scheduler_changes_nothing_in_whether_a_closure_is_needed(optimizer):
    """Its wrapper of `step` would seem to take the optimizer itself as an argument."""
    made = optimizer(mlp().parameters(), lr=0.1)
    expected = needs_closure(made)
    torch.optim.lr_scheduler.StepLR(made, 1)
    assert expected == needs_closure(made) == (optimizer is torch.optim.LBFGS)


def test_a_step_computes_once_where_no_closure_is_needed():
    """With the scheduler that every run has."""
    calls = []

    def step(model, batch):
        calls.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    train(World(), mlp(), classes(32), step=step, optimizer="sgd", lr=0.1, batch_size=BATCH, steps=STEPS)
    assert [BATCH] * STEPS == calls


class Curved(torch.optim.SGD):
    """Scales an update by a second derivative, as AdaHessian does."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(torch.autograd.grad(p.grad, p, torch.ones_like(p.grad))[0].abs())
        super().step()


def refused(world, options):
    model = mlp()
    with pytest.raises(TaskError) as error:
        train(world, model, classes(16), loss="cross_entropy", optimizer=functools.partial(Curved, lr=0.1), **options)
    assert_same_bits(weights(model), weights(mlp()))
    return str(error.value)


@pytest.mark.parametrize("strategy", ["dp=1", "dp=2", "shard=2"])
def test_an_optimizer_that_differentiates_gradients_is_one_sentence(run_ranks, strategy):
    """Nothing has been updated then."""
    for error in run_ranks(int(strategy[-1]), refused, {"strategy": strategy, "batch_size": 8}):
        assert "Curved" in error
        assert "no graph" in error or "cannot be tried on small tensors" in error
