"""Data parallelism with one shared copy of the weights on a host. The parity tests check its bits too."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from problems import ADAMW, alone, assert_same_bits, classes, mlp, seeded, strategy_of, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.strategies import choice
from nbdist.core.strategies.shared_weights import SharedWeights
from nbdist.core.task.task import Task
from nbdist.errors import PeerLostError, TaskError
from nbdist.plan import Plan


class Mine(torch.optim.SGD):
    """A user-defined optimizer, which might use all parameters at once."""


class Normed(nn.Module):
    """An embedding that writes its weights in forward."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(4, 2, max_norm=1.0)
        self.out = nn.Linear(6, 3)


CASES = {
    "a named optimizer": (mlp, {"optimizer": "adamw"}, {}, "SharedWeights"),
    "a factory of torch's": (mlp, {"optimizer": ADAMW}, {}, "SharedWeights"),
    "a ready optimizer": (mlp, {"optimizer": None}, {}, "DataParallel"),
    "an optimizer of their own": (mlp, {"optimizer": functools.partial(Mine, lr=0.1)}, {}, "DataParallel"),
    "clipping": (mlp, {"optimizer": "adamw"}, {"clip_norm": 1.0}, "DataParallel"),
    "an embedding that writes": (Normed, {"optimizer": "adamw"}, {}, "DataParallel"),
}


def choose(world, above):
    choice.SHARED_ABOVE = above
    chosen = {}
    for name, (make, options, more, _) in CASES.items():
        model = make()
        if options["optimizer"] is None:
            options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
        task = Task.create(model, classes(8), loss="cross_entropy", **options)
        strategy = choice.apply(task, Plan.create(ranks=world.size, cores=1, **more, **task.options), world)
        chosen[name] = type(strategy).__name__
        strategy.close()
    return chosen


def test_weights_are_shared_where_the_update_can_be_split(run_ranks):
    """Not if all gradients or the optimizer's whole state are needed, nor for a small model."""
    assert run_ranks(2, choose, 0) == [{name: expected for name, (*_, expected) in CASES.items()}] * 2
    assert run_ranks(2, choose, choice.SHARED_ABOVE) == [dict.fromkeys(CASES, "DataParallel")] * 2
    assert run_ranks(2, choose, 0, channel="process group") == [dict.fromkeys(CASES, "DataParallel")] * 2


def one_copy(world):
    model = mlp()
    if world.rank:
        nn.init.zeros_(model[0].weight)  # rank 0's weights are broadcast
    strategy = strategy_of(SharedWeights, world, model)
    began = weights(model)
    world.channel().barrier()
    if world.rank == 1:
        with torch.no_grad():
            model[0].weight.fill_(7.0)
    world.channel().barrier()
    during = model[0].weight.detach().clone()
    world.channel().barrier()
    strategy.close()
    with torch.no_grad():
        model[0].weight.fill_(float(world.rank))
    world.channel().barrier()
    return began, during, model[0].weight.detach().clone()


def test_ranks_map_the_same_weights_until_the_end(run_ranks):
    """All ranks map the same memory, with rank 0's weights; afterwards each rank has its own weights again."""
    expected = mlp()
    for rank, (began, during, after) in enumerate(run_ranks(3, one_copy)):
        assert_same_bits(weights(expected), began)
        assert torch.equal(torch.full_like(during, 7.0), during)
        assert torch.equal(torch.full_like(after, float(rank)), after)


def states(world):
    choice.SHARED_ABOVE = 0
    model, made = mlp(), []

    def optimizer(parameters):
        made.append(torch.optim.AdamW(parameters, lr=0.01))
        return made[0]

    train(world, model, classes(24), optimizer=optimizer, steps=2, batch_size=8)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return sorted(names[id(parameter)] for parameter in made[0].state)


@pytest.mark.parametrize("size", [2, 3])
def test_every_parameter_has_one_owner(run_ranks, size):
    """Only the owner holds a parameter's optimizer state."""
    owned = run_ranks(size, states)
    assert sorted(name for names in owned for name in names) == sorted(dict(mlp().named_parameters()))
    assert all(owned)


def lose_rank_one(world):
    choice.SHARED_ABOVE = 0

    def step(model, batch):
        x, y = batch
        loss = F.cross_entropy(model(x), y)
        if world.rank == 1:
            os._exit(7)  # as a kill would
        return loss

    try:
        train(world, mlp(), classes(24), step=step, optimizer="sgd", steps=2, batch_size=8)
    except PeerLostError:
        raise ZeroDivisionError("released") from None


def test_a_lost_rank_releases_the_others(run_ranks):
    """In the middle of a step, with an error and no hang."""
    with pytest.raises(ZeroDivisionError, match="released"):
        run_ranks(3, lose_rank_one)


class Writes(nn.Module):
    """Writes to a weight in its forward, in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        nn.init.uniform_(self.inner.weight, -0.09, 0.09)

    def forward(self, x):
        self.calls += self.training
        HOW[self.how](self.inner.weight, self.calls)
        return self.out(torch.tanh(self.inner(x)))


@torch.no_grad()
def in_place(weight, change):
    weight.copy_(change(weight))


def replaced(weight, call):
    weight.data = F.normalize(weight.data, dim=1)


def from_the_third_step(weight, call):
    if call > 2:
        weight.data.mul_(0.9)


def kept_from_the_first_step(weight, call):
    if call == 1:
        weight.kept = weight.data
    weight.kept.mul_(0.9)


HOW = {
    "replaces the data": replaced,
    "shrinks the data": lambda weight, call: weight.data.mul_(0.9),
    "shrinks it in place": lambda weight, call: in_place(weight, lambda value: value * 0.9),
    "shrinks it as an array": lambda weight, call: weight.detach().numpy().__imul__(0.9),
    "keeps the data in bounds that are first reached later": lambda weight, call: weight.data.clamp_(-0.1, 0.1),
    "keeps it in such bounds in place": lambda weight, call: in_place(weight, lambda value: value.clamp(-0.1, 0.1)),
    "begins to shrink the data in the third step": from_the_third_step,
    "shrinks the data that it took in the first step": kept_from_the_first_step,
    "only reads the data": lambda weight, call: weight.data.norm(),
}
OPTIONS = {"optimizer": "sgd", "lr": 0.5, "batch_size": 24, "steps": 6, "shuffle": False}


def writing(world, how):
    choice.SHARED_ABOVE = 0
    model = seeded(lambda: Writes(how), torch.float64)
    result, trained = train(world, model, classes(24), val=classes(6), **OPTIONS)
    return result.history[-1]["loss"], trained


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [2, 3])
def test_a_model_that_writes_to_its_weights_trains_as_on_one_rank(run_ranks, how, size):
    """Each rank writes to private memory, and continues from the owner's values."""
    result, expected = alone(seeded(lambda: Writes(how), torch.float64), classes(24), val=classes(6), **OPTIONS)
    for loss, trained in run_ranks(size, writing, how):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-9)
        assert pytest.approx(result.history[-1]["loss"], rel=1e-9) == loss


def writes_late(model, batch):
    x, y = batch
    model.steps = getattr(model, "steps", 0) + 1
    if model.steps == 3:
        in_place(model[3].weight, lambda value: value * 0.9)
    return F.cross_entropy(model(x), y)


def late(world):
    choice.SHARED_ABOVE = 0
    model = mlp()
    with pytest.raises((TaskError, PeerLostError)) as caught:
        train(world, model, classes(24), step=writes_late, optimizer="sgd", steps=6, batch_size=8)
    return type(caught.value).__name__, str(caught.value), model.steps


def test_writing_to_a_shared_weight_from_a_later_step_on_is_refused(run_ranks):
    """The error comes in that step and names the parameter and the fix: other ranks may have read half a write."""
    for kind, message, steps in run_ranks(2, late):
        assert 3 == steps
        assert kind == "PeerLostError" or ("parameter 3.weight in place" in message and "3.weight.data" in message)


def grows(model, batch):
    model[0].weight.data = torch.zeros(9, 6, dtype=torch.float64)
    return F.linear(batch[0], model[0].weight).square().mean()


def grown(world):
    choice.SHARED_ABOVE = 0
    train(world, mlp(), classes(24), step=grows, optimizer="sgd", steps=6, batch_size=8)


def test_a_weight_of_another_shape_is_refused(run_ranks):
    """The error names both shapes."""
    with pytest.raises(TaskError, match=r"changes parameter 0.weight to shape \[9, 6\].* from \[8, 6\]"):
        run_ranks(2, grown)
