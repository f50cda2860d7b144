"""Synchronized BatchNorm: N ranks train as one process with the whole batch."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import CLASSES, FEATURES, SGD, alone, classes, losses, seeded, train
from torch import nn

from nbdist.core.comm.world import World
from nbdist.errors import PlanError, TaskError

BATCH = 12
TOLERANCE = 1e-10


class Norms(nn.Module):
    """Every kind of BatchNorm, two of them in parallel, one frozen in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, 8), nn.BatchNorm1d(8))
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.left, self.right = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, track_running_stats=False)
        self.flat = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm1d(32).eval()
        self.last = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.conv(torch.relu(self.first(x)).unsqueeze(1))
        x = torch.relu(self.left(x) + self.right(x.tanh()))
        return self.last(self.frozen(self.flat(x.unflatten(-1, (2, 4))).flatten(1)))


def row():
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
                         nn.ReLU(), nn.Linear(8, CLASSES))  # fmt: skip


class OneOfTwo(nn.Module):
    """The first feature of a slice chooses the norm."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(FEATURES) for _ in range(2))
        self.last = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.last(self.norms[int(x[0, 0] > 0)](x))


def one_of_two(world):
    x, y = classes(BATCH)
    x[0, 0], x[BATCH // 2, 0] = -1.0, 1.0
    train(world, seeded(OneOfTwo, torch.float64), (x, y), batch_size=BATCH, shuffle=False, optimizer=SGD,
          strategy="dp=2", sync_batchnorm=True)  # fmt: skip


def problem(samples, ignored=0):
    x, y = classes(samples)
    y[BATCH - ignored : BATCH] = -100
    return x + 100, y


def run(world, make, mesh, samples, *, ignored=0, **options):
    model = seeded(make, torch.float64)
    options = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "optimizer": SGD, "check": "no"} | options
    before = [dict(vars(module)) for module in model.modules()]
    result, trained = train(world, model, problem(samples, ignored), strategy=mesh, **options)
    assert before == [vars(module) for module in model.modules()]  # no trace is left
    return losses(result), trained


def runs(world, make, mesh, cases, **options):
    return [run(world, make, mesh, sync_batchnorm=True, **options, **case) for case in cases]


# The last batch: 4 samples of 12 for three ranks are two slices; BatchNorm cannot train on 1 sample.
CASES = [
    {"samples": 2 * BATCH},
    {"samples": 2 * BATCH + 7},
    {"samples": BATCH + 3},
    {"samples": 2 * BATCH, "ignored": 7},
]


@pytest.mark.parametrize(
    ("mesh", "channel"),
    [
        *((mesh, "shared memory") for mesh in ("dp=2", "dp=3", "shard=2", "dp=2,shard=2", "shard=3")),
        ("dp=3", "shared weights"), ("dp=3", "process group"), ("shard=2", "process group"),
    ],
)  # fmt: skip
def test_ranks_equal_one_process_with_the_whole_batch(run_ranks, mesh, channel):
    """Weights, losses and running statistics, on every rank, a short last batch and ignored targets included."""
    size = {"dp=2,shard=2": 4, "dp=3": 3, "shard=3": 3}.get(mesh, 2)
    expected = [run(World(), Norms, "dp=1", **case) for case in CASES]
    for rank in run_ranks(size, runs, Norms, mesh, CASES, channel=channel):
        torch.testing.assert_close(rank, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_in_a_pipeline(run_ranks, schedule):
    """Each microbatch is normalized over the replicas."""
    settings = {"schedule": schedule, "microbatches": 1}
    expected = [run(World(), row, "dp=1", **case) for case in CASES]
    for rank in run_ranks(4, runs_in_pipeline, settings):
        torch.testing.assert_close(rank, expected, rtol=TOLERANCE, atol=TOLERANCE)


def runs_in_pipeline(world, settings):
    return runs(world, row, "dp=2,pp=2", CASES, **settings)


def test_a_sharded_pipeline(run_ranks):
    """As any other."""
    expected = [run(World(), row, "dp=1", **case) for case in CASES]
    for rank in run_ranks(4, functools.partial(runs, microbatches=1), row, "shard=2,pp=2", CASES):
        torch.testing.assert_close(rank, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "dp=2,pp=2"])
def test_microbatches(run_ranks, mesh):
    """The k-th slices of all ranks are normalized together."""
    options = {"microbatches": 2} if "pp" in mesh else {"accumulate": 2}
    x, y = problem(2 * BATCH)
    # One process runs contiguous halves; the ranks run quarters 0 and 2, then 1 and 3.
    quarters = torch.arange(2 * BATCH).view(2, 2, 2, -1).transpose(1, 2).reshape(-1)
    _, expected = alone(
        seeded(row, torch.float64), (x[quarters], y[quarters]), batch_size=BATCH, epochs=1, shuffle=False,
        optimizer=SGD, accumulate=2,
    )  # fmt: skip
    ranks = run_ranks(4 if "pp" in mesh else 2, functools.partial(run, epochs=1, sync_batchnorm=True, **options), row,
                      mesh, 2 * BATCH)  # fmt: skip
    for _, trained in ranks:
        torch.testing.assert_close(trained, expected, rtol=TOLERANCE, atol=TOLERANCE)


def half(world):
    model = seeded(row)
    train(world, model, classes(BATCH, torch.float32), batch_size=BATCH, precision="bf16", sync_batchnorm=True,
          shuffle=False, optimizer=SGD)  # fmt: skip
    return model.state_dict()


def test_in_half_precision(run_ranks):
    """Statistics are computed in float32."""
    (expected,), ranks = run_ranks(1, half), run_ranks(2, half)
    for rank in ranks:
        torch.testing.assert_close(rank, expected, rtol=0, atol=0.01)


class Deciding(nn.Module):
    """A forward that only torch.export can trace."""

    def __init__(self):
        super().__init__()
        self.layers = row()

    def forward(self, x):
        return self.layers(x if x.shape[0] > 1 else -x)


def test_a_pipeline_that_only_export_can_trace_is_refused(run_ranks):
    """Its graph has no BatchNorm layers."""
    with pytest.raises(TaskError, match="cannot be cut into stages"):
        run_ranks(4, functools.partial(run, sync_batchnorm=True), Deciding, "dp=2,pp=2", BATCH)


def test_a_model_without_batchnorm(run_ranks):
    """The option has no effect on it."""
    expected = run(World(), plain, "dp=1", BATCH)
    for rank in run_ranks(2, functools.partial(run, sync_batchnorm=True), plain, "dp=2", BATCH):
        torch.testing.assert_close(rank, expected, rtol=TOLERANCE, atol=TOLERANCE)


def plain():
    return nn.Linear(FEATURES, CLASSES)


class Stream(torch.utils.data.IterableDataset):
    """Samples one by one; the last batch has 5."""

    def __iter__(self):
        yield from zip(*problem(2 * BATCH + 5), strict=True)


def streamed(world, mesh):
    model = seeded(row, torch.float64)
    result, trained = train(world, model, Stream(), strategy=mesh, batch_size=BATCH, optimizer=SGD, sync_batchnorm=True)
    return losses(result), trained


@pytest.mark.parametrize("mesh", ["dp=3", "shard=3"])
def test_a_stream(run_ranks, mesh):
    """Ranks take its samples in turn, which make the same batch."""
    (expected,) = run_ranks(1, streamed, "dp=1")
    for rank in run_ranks(3, streamed, mesh):
        torch.testing.assert_close(rank, expected, rtol=TOLERANCE, atol=TOLERANCE)


class Wide(nn.Module):
    """BatchNorm between layers that tensor parallelism splits."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 16), nn.Linear(16, 8)
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.last(self.norm(self.down(torch.relu(self.up(x)))))


def test_beside_tensor_parallelism(run_ranks):
    """Ranks with the same part of a replica synchronize."""
    expected = [run(World(), Wide, "dp=1", **case) for case in CASES]
    for rank in run_ranks(4, runs, Wide, "dp=2,tp=2", CASES):
        torch.testing.assert_close(rank, expected, rtol=1e-9, atol=1e-9)


def test_ranks_whose_data_choose_other_layers_are_refused(run_ranks):
    """Their statistics would be mixed up, for they have the same size; the sentence names both layers."""
    names = r"rank 0 in all-gather of \d+ bytes for the statistics of norms.0, rank 1 .* of norms.1\. .*sync_batchnorm"
    with pytest.raises(PlanError, match=names):
        run_ranks(2, one_of_two)
