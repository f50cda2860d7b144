"""`nbdist.gather` in a step: the loss and gradients of one process that has the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import FEATURES, classes, seeded, stop_after, train, weights
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.comm.world import World
from nbdist.errors import PlanError, TaskError

SAMPLES, BATCH = 33, 8  # the last batch has one sample
OPTIONS = {"optimizer": "sgd", "lr": 0.1, "batch_size": BATCH, "epochs": 2, "shuffle": False}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, 4)

    def forward(self, x):
        return F.normalize(self.last(torch.tanh(self.first(x))), dim=-1)


def encoder():
    return seeded(Encoder, torch.float64)


def data():
    x, _ = classes(SAMPLES)
    return x, x + 0.1 * x.flip(0), torch.arange(SAMPLES)


def two_views(model, batch):
    both = model(torch.cat(batch[:2])).view(2, len(batch[0]), -1)
    return both[0], both[1]


def all_against_all(model, batch):
    """Every rank computes the loss of the whole batch."""
    first, second = map(nbdist.gather, two_views(model, batch))
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first)))


def own_against_all(model, batch):
    """Every rank computes the loss of its own rows, with the others' as negatives."""
    first, second = two_views(model, batch)
    labels = (nbdist.gather(batch[2])[None] == batch[2][:, None]).double().argmax(1)
    return F.cross_entropy(first @ nbdist.gather(second).T / 0.1, labels)


def unmasked_against_all(model, batch):
    """As above, but some slices have no row that counts, though others count theirs as negatives."""
    first, second = two_views(model, batch)
    counted = batch[2] % 8 < 3
    labels = (nbdist.gather(batch[2])[None] == batch[2][:, None]).double().argmax(1)
    loss = F.cross_entropy(first @ nbdist.gather(second).T / 0.1, labels.where(counted, -100))
    return loss, counted.sum()


def batch_statistics(model, batch):
    rows = nbdist.gather(model(batch[0]))
    return (rows.std(0) - 0.5).square().sum() if len(rows) > 1 else rows.square().mean()


STEPS = [all_against_all, own_against_all, unmasked_against_all, batch_statistics]


def by_hand(step):
    model = copy.deepcopy(encoder())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        for start in range(0, SAMPLES, BATCH):
            optimizer.zero_grad()
            loss = step(model, [tensor[start : start + BATCH] for tensor in data()])
            loss = loss[0] if isinstance(loss, tuple) else loss
            if loss.isfinite():
                loss.backward()
                optimizer.step()
    return weights(model)


def gathering(world, step, options):
    result, trained = train(world, encoder(), data(), step=step, **OPTIONS, **options)
    return trained, result.plan.checked


def assert_as_by_hand(run_ranks, step, ranks, strategy, channel="shared memory", **options):
    found = run_ranks(ranks, gathering, step, {"strategy": strategy, **options}, channel=channel)
    for trained, _ in found:
        torch.testing.assert_close(trained, by_hand(step), rtol=0, atol=1e-12)
    return found[0][1]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("channel", ["shared memory", "shared weights", "process group"])
def test_a_loss_over_the_whole_batch_trains_as_in_one_process(run_ranks, step, channel):
    """On data parallelism, the last batch of one sample included; the check compares it with the whole batch."""
    assert "as in one process" in assert_as_by_hand(run_ranks, step, 2, "data", channel)


@pytest.mark.parametrize("step", STEPS[1:3])
@pytest.mark.parametrize(
    ("ranks", "strategy", "options"),
    [
        (3, "data", {}),
        (2, "shard", {}),
        (2, "tensor", {}),
        pytest.param(4, "dp=2,pp=2", {"microbatches": 1, "split_at": ("last",)}, marks=pytest.mark.parity),
        pytest.param(4, "dp=2,shard=2", {}, marks=pytest.mark.parity),
        pytest.param(4, "dp=2,tp=2", {}, marks=pytest.mark.parity),
    ],
)
def test_so_it_does_on_other_meshes(run_ranks, step, ranks, strategy, options):
    """Those on which every rank of the data axis has one slice."""
    assert_as_by_hand(run_ranks, step, ranks, strategy, **options)


def val_losses(world):
    result, _ = train(world, encoder(), data(), step=own_against_all, val=data(), strategy="data", **OPTIONS)
    return [row["val_loss"] for row in result.history]


def test_evaluation_sees_the_whole_batch_too(run_ranks):
    """Its losses are those of one rank."""
    expected = val_losses(World())
    for found in run_ranks(2, val_losses):
        assert expected == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 2}, "but with accumulate=2 a rank may compute several slices .* one after another: use 1"),
        ({"reproducible": 2}, "but with reproducible=2 a rank may compute several .*: omit it"),
        ({"strategy": "pipeline"}, r"but with a pipeline of 2 microbatches .*: use microbatches=1, accumulate=1"),
    ],
)
def test_slices_one_after_another_are_refused(run_ranks, options, message):
    """A slice that is not computed yet has no rows to give."""
    with pytest.raises(TaskError, match=message):
        run_ranks(2, gathering, all_against_all, {"strategy": "data", **options})


def both_kinds_at_once(model, batch):
    both = nbdist.gather(torch.cat(two_views(model, batch)))
    first, second = both.chunk(2)
    return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(first)))


def test_rows_in_another_order_are_found(run_ranks):
    """Two kinds of rows in one tensor come rank by rank, not kind by kind."""
    with pytest.raises(PlanError, match=r"probably the rows of nbdist.gather are not .*Gather each kind by itself"):
        run_ranks(2, gathering, both_kinds_at_once, {"strategy": "data"})


def other_shapes(model, batch):
    rows = model(batch[0])
    return nbdist.gather(rows[:, : 2 + int(batch[2][0] > 3)]).square().mean()


def test_rows_of_other_shapes_are_refused(run_ranks):
    """Before any number of theirs is exchanged."""
    with pytest.raises(TaskError, match=r"nbdist.gather got rows of other shapes or dtypes on other ranks \(here"):
        run_ranks(2, gathering, other_shapes, {"strategy": "data", "check": "no"})


def test_outside_of_a_run_it_changes_nothing():
    """So that the same step serves a plain loop."""
    rows = torch.randn(3, 2)
    assert nbdist.gather(rows) is rows
    with pytest.raises(TaskError, match="takes a tensor whose first dimension is the samples, not a tensor without"):
        nbdist.gather(torch.tensor(1.0))
    with pytest.raises(TaskError, match="not a list"):
        nbdist.gather([1, 2])


def ranks_seen(world, mesh):
    seen = []

    def step(model, batch):
        seen.append((nbdist.rank(), nbdist.world_size()))
        return F.mse_loss(model(batch[0]), batch[1])

    def by_rank(model, batch):
        return F.mse_loss(model(batch[0]), batch[1]) * (1 + nbdist.rank())

    x, _ = classes(BATCH)
    model = seeded(lambda: nn.Linear(FEATURES, FEATURES), torch.float64)
    train(world, model, (x, x), step=step, batch_size=BATCH, steps=2, optimizer="sgd", strategy=mesh)
    with pytest.raises(PlanError, match="as one process has it for the same"):
        train(world, model, (x, x), step=by_rank, batch_size=BATCH, steps=2, optimizer="sgd", strategy=mesh)
    return seen


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "tp=2"])
def test_a_step_knows_its_rank(run_ranks, mesh):
    """In the world; in the check it is the only one, so that a loss which depends on it is found."""
    assert [[(0, 2)] * 2, [(1, 2)] * 2] == run_ranks(2, ranks_seen, mesh)


def test_outside_of_a_run(monkeypatch):
    """They are those of torchrun, and of an only process in a notebook."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (0, 1) == (nbdist.rank(), nbdist.world_size())
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (3, 4) == (nbdist.rank(), nbdist.world_size())


def counting(model, batch):
    return F.mse_loss(model(batch[0]), batch[0][:, :4]), {"at": nbdist.current_step()}


def counted(world, options, folder):
    """The mean number of the step in each epoch, of a run that stops in the second one and is resumed."""
    first = {"commands": stop_after(7), "checkpoint": folder}
    train(world, encoder(), data(), step=counting, **OPTIONS | options | first)
    result, _ = train(world, encoder(), data(), step=counting, **OPTIONS | options, resume=folder)
    return [row["at"] for row in result.history]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {"accumulate": 2}), (2, {}), (2, {"strategy": "shard"}), (2, {"strategy": "pp", "split_at": "last"}),
     (3, {"reproducible": 4})],
)  # fmt: skip
def test_a_step_knows_its_number(run_ranks, tmp_path, ranks, options):
    """Of all slices the same; it goes on in a run that is resumed."""
    sizes = [BATCH] * 4 + [1]
    expected = [sum((first + i) * n for i, n in enumerate(sizes)) / SAMPLES for first in (0, 5)]
    for means in run_ranks(ranks, counted, options, str(tmp_path)):
        assert expected == pytest.approx(means)
    assert 0 == nbdist.current_step()
