"""After an error, the last complete step is saved: on the rank that failed, and on those that waited for it."""

from __future__ import annotations

import math

import pytest
import torch
from problems import ADAMW, assert_same_bits, seeded, stop_after, train, weights
from test_snapshotter import SAMPLES, Items, Net, options_of, tensors
from torch import nn
from torch.nn import functional as F

from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.restore import load_whole
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.errors import PeerLostError, TaskError


class Failing:
    """Raises on one rank, in one call of one place of a training.

    Args:
        where: The place.
        rank: The rank.
        call: Which call, counted from 1.
    """

    def __init__(self, where, rank, call):
        self.where, self.rank, self.call, self.calls = where, rank, call, 0

    def options(self, options):
        """The options of a training, with the failure in them."""
        make = getattr(self, self.where, None)
        return options if make is None else {**options, self.where: make(options)}

    def __call__(self):
        self.calls += 1
        if self.calls == self.call:
            raise ZeroDivisionError(f"in {self.where}")

    def metric(self, _options):
        return lambda output, target: self() or (output.argmax(1) == target).float().mean()

    def loss(self, _options):
        return lambda output, target: self() or F.cross_entropy(output, target)

    def lr_scheduler(self, _options):
        return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: self() or 1.0)

    def optimizer(self, options):
        def make(parameters):
            optimizer = options["optimizer"](parameters)
            optimizer.register_step_pre_hook(lambda *_: self())
            optimizer.register_step_post_hook(lambda *_: self())
            return optimizer

        return make


class Raises(torch.autograd.Function):
    """Backward fails."""

    @staticmethod
    def forward(ctx, x, failing):
        ctx.failing = failing
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.failing()
        return gradient, None


class FailingNet(Net):
    """Raises in forward, after running statistics were written, or in backward."""

    failing = None
    rarely = 10**6

    def forward(self, x):
        output = super().forward(x)
        if self.failing is not None and self.training:
            if self.failing.where == "forward":
                self.failing()
            if self.failing.where == "backward":
                return Raises.apply(output, self.failing)
        return output


class FailingItems(Items):
    """Raises for a sample that is read in the second epoch, before any draw."""

    failing = None

    def __getitem__(self, i):
        if self.failing is not None:
            self.failing()
        return super().__getitem__(i)


def fail(world, where, rank, call, paths, options):
    """Train until rank `rank` fails; returns the error that each rank sees."""
    failing = Failing(where, rank, call)
    model, data = seeded(FailingNet), FailingItems()
    if world.rank == rank:
        options = failing.options(options)
        model.failing = failing
        data.failing = failing if where == "data" else None
    elif where in ("optimizer", "lr_scheduler", "metric"):  # the same kind on all ranks
        options = Failing(where, rank, -1).options(options)
    try:
        train(world, model, data, snapshot_paths=paths, **options)
    except (ZeroDivisionError, PeerLostError, TaskError) as error:
        return type(error.__cause__ if isinstance(error, TaskError) else error).__name__


def loaded_snapshot(paths, make=FailingNet):
    """The newest snapshot in an ordinary model and optimizer: its step, weights and buffers, and state."""
    model = seeded(make)
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    saved = CheckpointReader.of_snapshot(paths)
    load_whole(saved, model, {"": optimizer})
    names = {id(p): name for name, p in model.named_parameters()}
    state = {f"{names[id(p)]}/{k}": v.clone() for p, own in optimizer.state.items() for k, v in own.items()}
    return saved.step, saved.ranks[0]["position"], weights(model) | state


def stopped_run(world, paths, at, options):
    train(world, seeded(FailingNet), FailingItems(), snapshot_paths=paths, commands=stop_after(at), **options)


def counts(position):
    """The progress without its seconds."""
    return [position[name] for name in ("epoch", "batch", "step", "samples")], position["row"]["loss"], [
        {**row, "seconds": 0} for row in position["history"]
    ]  # fmt: skip


PLACES = {  # the call that fails, and the last complete step; None if the error is inside an update
    "forward": (2 * 7 + 2, 7),
    "backward": (2 * 7 + 1, 7),
    "loss": (2 * 7 + 2, 7),
    "data": (SAMPLES // 2 + 8 * 2 + 3, 7),
    "metric": (2, 5),  # the first call only finds out what it returns
    "optimizer": (2 * 7 + 2, None),
    "lr_scheduler": (2 + 8, None),
}


@pytest.mark.parametrize(("where", "rank"), [(where, i % 2) for i, where in enumerate(PLACES)])
def test_after_an_error_the_last_complete_step_is_saved(run_on_each_channel, where, rank):
    """Weights, statistics, state and progress, bit for bit; after half an update, an earlier snapshot."""
    call, expected_step = PLACES[where]
    options = options_of() if where == "metric" else options_of(val=None, metric=None)
    snapshot_store, other = SnapshotStore(2), SnapshotStore(2)
    outcomes = run_on_each_channel(2, fail, where, rank, call, snapshot_store.paths, options)
    assert "ZeroDivisionError" == outcomes[rank]
    step, position, loaded = loaded_snapshot(snapshot_store.paths)
    assert step == expected_step or (expected_step is None and 1 <= step <= 8)
    run_on_each_channel(2, stopped_run, other.paths, step, options)
    expected = loaded_snapshot(other.paths)
    assert (step, counts(position)) == (expected[0], counts(expected[1]))
    assert_same_bits(expected[2], loaded)
    snapshot_store.close()
    other.close()


def explode(world, paths, stop):
    """A loss that is not finite in the fourth step: the error, and the weights after it."""
    calls, model = iter(range(1, 99)), seeded(Net)
    options = options_of(val=None, metric=None, accumulate=1, loss=lambda output, y: (
        F.cross_entropy(output, y) * (float("nan") if next(calls) == 4 else 1.0)))  # fmt: skip
    try:
        train(world, model, tensors(), snapshot_paths=paths, stop_on_nan=stop, **options)
    except TaskError as error:
        return str(error), weights(model)
    return "", weights(model)


def test_stop_on_nan(run_ranks):
    """All ranks fail before the weights change; without the option, the weights become nan."""
    snapshot_store, other = SnapshotStore(1), SnapshotStore(1)
    ((text, left),) = run_ranks(1, explode, snapshot_store.paths, True)
    assert "the loss is nan in step 4: lower the learning rate" in text
    assert all(tensor.isfinite().all() for tensor in left.values())
    step, _, loaded = loaded_snapshot(snapshot_store.paths, Net)
    assert 3 == step
    assert all(tensor.isfinite().all() for tensor in loaded.values())
    ((text, left),) = run_ranks(1, explode, other.paths, False)
    assert ("", True) == (text, bool(left["first.weight"].isnan().any()))
    snapshot_store.close()
    other.close()


def layers():
    """A model that every mesh can split, with running statistics."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def fail_on_mesh(world, mesh, where, paths):
    """The last rank fails in the loss after seven steps, or in its eighth update; each rank's error."""
    steps = []

    def rates(optimizer):
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        optimizer.register_step_pre_hook(lambda *_: rarely() if where == "update" else None)

        class Still:
            """A scheduler that changes nothing and has no state."""

            def step(self):
                pass

            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        return Still()

    def rarely():
        if len(steps) == 7 and world.rank == world.size - 1:
            raise ZeroDivisionError(f"in {where}")

    def loss(output, target):
        if where == "loss":
            rarely()
        return F.cross_entropy(output, target)

    try:
        options = {"optimizer": ADAMW, "lr_scheduler": rates, "loss": loss, **ON_MESH, "strategy": mesh}
        train(world, seeded(layers), tensors(), snapshot_paths=paths, **options)
    except (ZeroDivisionError, PeerLostError) as error:
        return type(error).__name__


def stopped_on_mesh(world, mesh, at, paths):
    stop = stop_after(at)
    train(
        world, seeded(layers), tensors(), snapshot_paths=paths, optimizer=ADAMW, commands=stop, **ON_MESH, strategy=mesh
    )


ON_MESH = {"batch_size": 16, "epochs": 3, "accumulate": 2, "seed": 4, "check": "no"}
HYBRIDS = [pytest.param(mesh, marks=pytest.mark.parity) for mesh in ("dp=2,shard=2", "shard=2,pp=2", "pp=2,tp=2")]


@pytest.mark.parametrize("where", ["loss", "update"])
@pytest.mark.parametrize("mesh", ["shard=2", "pp=2", "tp=2", *HYBRIDS])
def test_the_same_with_a_sharded_model(run_ranks, mesh, where):
    """Wherever a rank was: inside a gathered block, or with other ranks waiting in a stage."""
    size = math.prod(int(part[-1]) for part in mesh.split(","))
    snapshot_store, other = SnapshotStore(size), SnapshotStore(size)
    outcomes = run_ranks(size, fail_on_mesh, mesh, where, snapshot_store.paths)
    assert "ZeroDivisionError" == outcomes[-1]
    step, position, loaded = loaded_snapshot(snapshot_store.paths, layers)
    assert step == 7 if where == "loss" else 1 <= step <= 7
    run_ranks(size, stopped_on_mesh, mesh, step, other.paths)
    expected = loaded_snapshot(other.paths, layers)
    assert (step, counts(position)) == (expected[0], counts(expected[1]))
    assert_same_bits(expected[2], loaded)
    snapshot_store.close()
    other.close()
