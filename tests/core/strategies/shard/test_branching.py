"""Models that branch by their data on a mesh with shard: ranks compute different blocks, and no number changes."""

from __future__ import annotations

import pytest
import torch
from problems import seeded, train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nbdist.core.comm.world import World
from nbdist.core.strategies.shard import mapped_blocks
from nbdist.core.strategies.shard.collective_sequence import CollectiveSequence

WIDTH, EXPERTS = 6, 4
ROUTES = [
    [0, 1, 2, 3, 1, 1, 1, 1], [2, 2, 2, 2, 0, 3, 3, 0], [3, 3, 1, 1, 3, 1, 3, 0], [0, 0, 0, 0, 0, 0, 0, 0],
    [3, 2, 1, 0, 2, 1, 3, 0], [1, 1, 3, 3, 2, 2, 0, 0],
]  # fmt: skip
"""The expert of each sample, a batch a line. The first samples, of which blocks are chosen, meet all of them."""


class Experts(nn.Module):
    """Computes only the experts that its samples select; in evaluation, sample by sample."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.once(x) if self.training else torch.cat([self.once(row) for row in x.split(1)])

    def once(self, x):
        routes = x[:, 0].round().int().tolist()
        return self.last(self.middle(torch.tanh(self.first(x)), torch.tensor(routes), routes)) * self.scale

    def middle(self, x, chosen, routes):
        out = torch.zeros_like(x)
        for number in self.order(routes):
            out[chosen == number] = self.expert(number, x[chosen == number])
        return out

    def order(self, routes):
        return sorted(set(routes))

    def expert(self, number, x):
        return torch.tanh(self.experts[number](x))


class InTheOrderOfTheData(Experts):
    def order(self, routes):
        return list(dict.fromkeys(routes))


class Checkpointed(Experts):
    """Computed again in backward."""

    def expert(self, number, x):
        return checkpoint(super().expert, number, x, use_reentrant=False)


class CheckpointedReentrant(Experts):
    def expert(self, number, x):
        return checkpoint(super().expert, number, x, use_reentrant=True)


class ReadsWeights(Experts):
    """Of a module that it does not call."""

    def expert(self, number, x):
        return F.linear(x, self.experts[number].weight, self.experts[0].bias)


class Repeats(Experts):
    """One layer as often as the data say."""

    def middle(self, x, chosen, routes):
        for _ in range(1 + max(routes)):
            x = torch.tanh(self.experts[0](x))
        return self.experts[1](self.experts[2](self.experts[3](x)))


class ExitsEarly(Experts):
    def middle(self, x, chosen, routes):
        for number in range(1 + max(routes)):
            x = x + torch.tanh(self.experts[number](x))
        return x


class DropsLayers(Experts):
    """By random numbers, of which each slice has its own; none in the first slice."""

    def middle(self, x, chosen, routes):
        for number in range(EXPERTS):
            if not self.training or routes == [0, 1, 2, 3] or torch.rand(()) < 0.5:
                x = x + torch.tanh(self.experts[number](x))
        return x


class StopsGradients(Experts):
    """Some ranks have no backward through the experts."""

    def middle(self, x, chosen, routes):
        return super().middle(x.detach() if routes[0] > 1 else x, chosen, routes)


class LeavesAllOut(Experts):
    """On some ranks the loss needs no weight of an expert."""

    def middle(self, x, chosen, routes):
        return x if routes[0] == 0 and 1 not in routes else super().middle(x, chosen, routes)


MODELS = {
    model.__name__: model
    for model in (
        Experts, InTheOrderOfTheData, Checkpointed, CheckpointedReentrant, ReadsWeights, Repeats, ExitsEarly,
        DropsLayers, StopsGradients, LeavesAllOut,
    )
}  # fmt: skip


def data():
    x = torch.randn(8 * len(ROUTES), WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x.flip(1)
    x[:, 0] = torch.tensor(ROUTES).flatten()
    return x, y


def trained(world, model, options, prepare=None):
    if prepare is not None:
        prepare()
    made, (x, y) = seeded(MODELS[model], torch.float64), data()
    optimizer = torch.optim.SGD(made.parameters(), 0.05, momentum=0.9)
    result, weights = train(
        world, made, (x, y), loss="mse", optimizer=optimizer, batch_size=8, epochs=2, shuffle=False,
        val=(x.roll(3, 0), y.roll(3, 0)), check="mesh", **options,
    )  # fmt: skip
    return [(row["loss"], row["val_loss"]) for row in result.history], weights


def assert_as_alone(results, model, slices):
    expected = trained(World(), model, {"accumulate": slices})
    for actual in results:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channel", ["shared memory", pytest.param("process group", marks=pytest.mark.parity)])
@pytest.mark.parametrize("model", MODELS)
def test_ranks_that_compute_other_layers_train_as_one_process(run_ranks, model, channel):
    """In forward, backward and evaluation: another choice, order or number of layers; mapped, and sent."""
    assert_as_alone(run_ranks(2, trained, model, {"strategy": "shard"}, channel=channel), model, 2)


@pytest.mark.parametrize(
    "channel", ["shared memory", *(pytest.param(c, marks=pytest.mark.parity) for c in ("process group", "two hosts"))]
)
@pytest.mark.parametrize("mesh", ["shard=4", "dp=2,shard=2", "shard=2,tp=2"])
def test_so_do_four_ranks(run_ranks, mesh, channel):
    """On every mesh, and over several hosts."""
    slices = 2 if "tp" in mesh else 4
    assert_as_alone(run_ranks(4, trained, "Experts", {"strategy": mesh}, channel=channel), "Experts", slices)


@pytest.mark.parametrize("channel", ["shared memory", "process group"])
def test_so_do_several_slices_a_step(run_ranks, channel):
    """Each of which branches by itself."""
    results = run_ranks(2, trained, "InTheOrderOfTheData", {"strategy": "shard", "accumulate": 2}, channel=channel)
    assert_as_alone(results, "InTheOrderOfTheData", 4)


def large():
    mapped_blocks._SMALL_BYTES = 0


def test_so_do_blocks_that_are_added_by_themselves(run_ranks):
    """Mapped blocks that are too large to wait: a rank that has none then serves the others."""
    assert_as_alone(run_ranks(2, trained, "Experts", {"strategy": "shard"}, large), "Experts", 2)


def compared(world, steps):
    """How often ranks of a model that does not branch compare what they need."""
    counts = []
    compare = CollectiveSequence._compare

    def counted(order, need):
        counts.append(need)
        return compare(order, need)

    CollectiveSequence._compare = counted
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
    x = torch.randn(8, WIDTH)
    train(world, model, (x, x), loss="mse", optimizer="sgd", batch_size=8, steps=steps, strategy="shard")
    return len(counts)


def test_after_the_first_step_ranks_compare_only_at_the_end_of_a_step(run_ranks):
    """A model that does not branch by its data is not slowed by those that do."""
    first, second, fifth = (run_ranks(2, compared, steps, channel="process group")[0] for steps in (1, 2, 5))
    assert [1, 4] == [second - first, fifth - first]
