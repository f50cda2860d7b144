"""A run resumed from a snapshot or checkpoint of any step has the same bits as an undisturbed run."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from problems import ADAMW, FEATURES, Given, assert_same_bits, classes, seeded, stop_after, train
from torch import nn
from torch.nn import functional as F

from nbdist.core.state import snapshotter
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import checkpoints, load_checkpoint
from nbdist.core.state.snapshot import SnapshotBuffer, SnapshotStore, newest
from nbdist.core.strategies.strategy import Strategy
from nbdist.errors import TaskError
from nbdist.telemetry import Checkpointed, Noted, RunStarted

SAMPLES, BATCH = 80, 16


class Net(nn.Module):
    """Dropout, running statistics, a large buffer that changes rarely, draws of NumPy and of `random`."""

    rarely = 3  # in forwards

    def __init__(self, width=12):
        super().__init__()
        self.first = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("mask", torch.ones(40_000))
        self.register_buffer("seen", torch.zeros(40_000))

    def forward(self, x):
        hidden = F.dropout(torch.relu(self.norm(self.first(x))), 0.3, self.training)
        if self.training:
            hidden = hidden + np.random.rand() * 0.1 + random.random() * 0.1
            if self.norm.num_batches_tracked % self.rarely == 0:
                self.seen += hidden.detach().mean()
        return self.frozen(self.last(hidden))


def wide():
    """Large enough for ranks to share its weights."""
    return Net(12_000)


def milestones(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7], gamma=0.5)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)


def options_of(**more):
    return {
        "optimizer": ADAMW, "batch_size": BATCH, "epochs": 3, "val": classes(32, torch.float32), "metric": "accuracy",
        "accumulate": 2, "check": "no", **more,
    }  # fmt: skip


def rows(result):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def tensors():
    return classes(SAMPLES, torch.float32)


def undisturbed_and_resumed(world, make, data, paths, folder, at, options):
    """History and weights of a run, and of one that was stopped and resumed, from memory or disk."""
    expected = train(world, seeded(make), data(), **options)
    first = {"snapshot_paths": paths} if folder is None else {"checkpoint": folder}
    stopped, _ = train(world, seeded(make), data(), commands=stop_after(at), **first, **options)
    assert stopped.state == "stopped"
    then = {"snapshot_paths": paths, "from_snapshot": True} if folder is None else {"resume": folder}
    model = seeded(make)
    if folder is not None:
        nn.init.zeros_(model.frozen.weight)
    actual = train(world, model, data(), **then, **options)
    return [(rows(result), tensors) for result, tensors in (expected, actual)]


def assert_same(outcomes):
    """Rows and weights of both runs are the same, on all ranks."""
    for expected, actual in outcomes:
        assert expected[0] == actual[0]
        assert_same_bits(expected[1], actual[1])


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("scheduler", [milestones, plateau])
@pytest.mark.parametrize("at", [1, 5, 8, 14])
def test_a_stop_changes_no_bit(run_ranks, tmp_path, where, scheduler, at):
    """Dropout, statistics, schedulers, draws of NumPy: in the middle of an epoch, and at its end."""
    snapshot_store = SnapshotStore(2)
    folder = str(tmp_path) if where == "disk" else None
    options = options_of(lr_scheduler=scheduler)
    assert_same(run_ranks(2, undisturbed_and_resumed, Net, tensors, snapshot_store.paths, folder, at, options))
    snapshot_store.close()


@pytest.mark.parametrize(("make", "where"), [(Net, "disk"), (wide, "memory")])
def test_over_each_channel(run_on_each_channel, tmp_path, make, where):
    """Each rank saves its own shards, whether ranks share the memory of weights or not."""
    snapshot_store = SnapshotStore(3)
    folder = str(tmp_path) if where == "disk" else None
    assert_same(
        run_on_each_channel(3, undisturbed_and_resumed, make, tensors, snapshot_store.paths, folder, 8, options_of())
    )
    snapshot_store.close()


class Stream(torch.utils.data.IterableDataset):
    """A stream of samples; each pass draws new noise."""

    def __iter__(self):
        noise = np.random.rand()
        for x, y in zip(*tensors(), strict=True):
            yield x + noise + torch.rand(1) * 0.1, y


class Items(torch.utils.data.Dataset):
    """Samples with random draws of all three kinds."""

    def __init__(self):
        self.x, self.y = tensors()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.rand(1) * 0.1 + np.random.rand() * 0.1 + random.random() * 0.1, self.y[i]


def workers():
    return torch.utils.data.DataLoader(Items(), batch_size=BATCH, shuffle=True, num_workers=2)


def sampled():
    """A sampler that draws from a generator of its own, whose state carries over from epoch to epoch."""
    data = torch.utils.data.TensorDataset(*tensors())
    generator = torch.Generator().manual_seed(9)
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=70, generator=generator)
    return torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=sampler)


@pytest.mark.parametrize(("ranks", "at"), [(1, 3), (3, 8)])
@pytest.mark.parametrize("data", [Stream, Items, workers, sampled])
def test_every_kind_of_data(run_ranks, tmp_path, data, at, ranks):
    """Streams, items, workers, samplers: the same samples, with the same random draws in them."""
    snapshot_store = SnapshotStore(ranks)
    assert_same(run_ranks(ranks, undisturbed_and_resumed, Net, data, snapshot_store.paths, None, at, options_of()))
    assert_same(
        run_ranks(ranks, undisturbed_and_resumed, Net, data, snapshot_store.paths, str(tmp_path), at, options_of())
    )
    snapshot_store.close()


@pytest.mark.parametrize("data", [tensors, Stream])
@pytest.mark.parametrize("at", [4, 5, 6, 12])
def test_steps_that_wrap_round_the_data(run_ranks, data, at):
    """In the first pass, at its end, and in a later one."""
    snapshot_store = SnapshotStore(2)
    options = options_of(epochs=None, steps=13)
    assert_same(run_ranks(2, undisturbed_and_resumed, Net, data, snapshot_store.paths, None, at, options))
    snapshot_store.close()


class Own(torch.optim.SGD):
    """A user's optimizer that counts its steps in a number."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["steps"] = state.get("steps", 0) + 1
                parameter.grad.mul_(1 / state["steps"])
        super().step(closure)


class Counting(torch.optim.SGD):
    """A user's optimizer whose rate depends on its own attributes, some of which its first step creates."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.calls, self.factors, self.params = np.int64(0), (1.0, [0.5]), list(self.param_groups[0]["params"])
        self.state["calls"] = {"all": 0}

    def step(self, closure=None):
        self.calls += 1
        self.state["calls"]["all"] += 1
        self.factors = (self.factors[0] + 1, [*self.factors[1], 0.5])
        self.mean = getattr(self, "mean", 0.0) * 0.9 + self.params[0].grad.norm().item()
        for group in self.param_groups:
            group["lr"] = (
                0.1 / self.calls / self.state["calls"]["all"] / len(self.factors[1]) / self.factors[0] / self.mean
            )
        super().step(closure)


OPTIMIZERS = [
    {"optimizer": functools.partial(Own, lr=0.1, momentum=0.9)}, {"clip_norm": 0.1},
    {"optimizer": functools.partial(Counting, lr=0.1)},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIMIZERS, ids=["own", "clip", "attributes"])
def test_an_optimizer_that_is_not_sharded(run_ranks, tmp_path, options):
    """Its state is saved too, with numbers, and so are its own attributes."""
    snapshot_store = SnapshotStore(2)
    for folder in (None, str(tmp_path)):
        assert_same(
            run_ranks(2, undisturbed_and_resumed, wide, tensors, snapshot_store.paths, folder, 8, options_of(**options))
        )
    snapshot_store.close()


def overflowing(output, target):
    """A loss whose scaled gradient is too large for half precision, for the first few scales."""
    return F.cross_entropy(output, target) * 100


def scale_after(paths):
    return CheckpointReader.of_snapshot(paths).ranks[0]["precision"]


def test_the_loss_scale_of_fp16_continues(run_ranks):
    """Its value, and the number of steps without overflow."""
    snapshot_store, other = SnapshotStore(2), SnapshotStore(2)
    options = options_of(precision="fp16", loss=overflowing)
    assert_same(run_ranks(2, undisturbed_and_resumed, Net, tensors, snapshot_store.paths, None, 8, options))
    run_ranks(2, undisturbed, Net, other.paths, options)
    assert scale_after(other.paths) == scale_after(snapshot_store.paths)
    assert scale_after(snapshot_store.paths)[0] < 2.0**16
    snapshot_store.close()
    other.close()


def undisturbed(world, make, paths, options):
    train(world, seeded(make), tensors(), snapshot_paths=paths, **options)


class Noting(torch.optim.SGD):
    """Has an object in its state."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["note"] = object()


class Wrapping(torch.optim.SGD):
    """Holds another optimizer, whose state changes."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.inner = torch.optim.Adam(self.param_groups[0]["params"], lr)

    def step(self, closure=None):
        self.inner.step()


class Averaging(torch.optim.SGD):
    """Holds a tensor, which it changes."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.mean, self.weights = torch.zeros(3), torch.ones(3)  # one that changes, and one that does not

    def step(self, closure=None):
        self.mean.add_(self.weights)
        super().step(closure)


def note(world, paths, folder, kind):
    notes = []
    sink = type("Sink", (), {"emit": lambda _, event: isinstance(event, Noted) and notes.append(event.text)})()
    options = options_of(optimizer=functools.partial(kind, lr=0.1), sinks=[sink])
    try:
        result, _ = train(world, seeded(Net), tensors(), snapshot_paths=paths, checkpoint=folder, **options)
    except TaskError as error:
        return str(error), notes
    return result.state, notes


UNFIT = [(Noting, "note is a object"), (Wrapping, "inner is a Adam"), (Averaging, "mean is a Tensor")]


@pytest.mark.parametrize(("kind", "what"), UNFIT)
def test_what_a_snapshot_cannot_hold(run_ranks, tmp_path, kind, what):
    """No snapshots are taken, with one note per rank; with checkpoints, it is an error."""
    snapshot_store = SnapshotStore(2)
    for state, notes in run_ranks(2, note, snapshot_store.paths, None, kind):
        assert "finished" == state
        (text,) = notes
        reason = f"the optimizer's {what}"
        assert text.startswith(f"no snapshots are taken, so after the loss of a rank the run starts over: {reason}")
    assert newest(snapshot_store.paths) is None
    for text, _ in run_ranks(2, note, snapshot_store.paths, str(tmp_path), kind):
        assert f"the optimizer's {what}, which a checkpoint cannot hold" in text
    snapshot_store.close()


def with_lag(world, function, *args):
    """Call it on a rank that reads the summed flags one step late, as on a GPU."""
    make = Strategy.__init__

    def with_lag_of_one(strategy, *given):
        make(strategy, *given)
        strategy.lag = 1

    Strategy.__init__ = with_lag_of_one
    return function(world, *args)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("at", [1, 4, 12])
def test_a_stop_that_is_received_late_changes_no_bit(run_ranks, tmp_path, where, at):
    """The run resumes from the step after which all ranks applied it."""
    snapshot_store = SnapshotStore(2)
    folder = str(tmp_path) if where == "disk" else None
    assert_same(
        run_ranks(2, with_lag, undisturbed_and_resumed, Net, tensors, snapshot_store.paths, folder, at, options_of())
    )
    snapshot_store.close()


def with_many_checkpoints(world, paths, folder, commands):
    """Train with a checkpoint every second step, and commanded ones; their events."""
    events = []
    sink = type("Sink", (), {"emit": lambda _, e: isinstance(e, (Noted, Checkpointed)) and events.append(e)})()
    options = options_of(checkpoint=folder, checkpoint_every=2, checkpoint_keep=100, epochs=12, sinks=[sink])
    train(world, seeded(Net), tensors(), snapshot_paths=paths, commands=Given(commands), **options)
    return events


@pytest.mark.parametrize("lags", [False, True])
def test_checkpoints_one_after_the_other(run_ranks, tmp_path, lags):
    """Each is complete when published, however soon the next planned or commanded one is due."""
    snapshot_store = SnapshotStore(2)
    commands = {step: [("checkpoint", str(tmp_path / "ordered"))] for step in (3, 4, 30, 31)}
    events, others = run_ranks(
        2,
        *([with_lag] if lags else []),
        with_many_checkpoints,
        snapshot_store.paths,
        str(tmp_path / "planned"),
        commands,
    )
    assert all(isinstance(event, Checkpointed) for event in [*events, *others]), events
    assert [] == others
    for name, least in ("planned", 3), ("ordered", 2):
        steps = [event.step for event in events if name in event.path]
        assert len(steps) >= least
        assert sorted(steps) == steps
        assert len(set(steps)) == len(checkpoints(tmp_path / name))  # the final one replaces one of the same step
        for each in checkpoints(tmp_path / name):
            load_checkpoint(str(tmp_path / name / each), Net())
    snapshot_store.close()


def test_a_folder_goes_by_any_of_its_names(run_ranks, tmp_path):
    """Commands may name the planned folder, and another one twice, by symbolic links."""
    for name in ("planned", "ordered"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name} too").symlink_to(tmp_path / name)
    names = ["planned too", "ordered", "ordered too", "ordered", "planned too"]
    commands = {3 + 4 * i: [("checkpoint", str(tmp_path / name))] for i, name in enumerate(names)}
    events, others = run_ranks(2, with_many_checkpoints, [], str(tmp_path / "planned"), commands)
    assert all(isinstance(event, Checkpointed) for event in events), events
    assert [] == others
    assert 3 == len(checkpoints(tmp_path / "ordered"))
    assert {3, 19}.issubset(event.step for event in events if str(tmp_path / "planned") in event.path)
    assert [] == [*tmp_path.glob("*/.lease-*")]


def with_little_memory(world, paths, folder, short):
    """Train where some ranks have little memory: the notes, and the steps in this rank's snapshot buffers."""
    notes = []
    sink = type("Sink", (), {"emit": lambda _, event: isinstance(event, Noted) and notes.append(event.text)})()
    with pytest.MonkeyPatch.context() as patch:
        if world.rank in short:
            patch.setattr(snapshotter, "available_bytes", lambda: 1000)
        train(world, seeded(Net), tensors(), snapshot_paths=paths, checkpoint=folder, sinks=[sink], **options_of())
    return notes, [SnapshotBuffer(path).head.step for path in paths[world.rank]]


@pytest.mark.parametrize("short", [[1], [0, 1]], ids=["on one rank", "on all"])
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_too_little_memory_for_snapshots(run_ranks, tmp_path, disk, short):
    """No rank takes any, and all ranks emit a note; checkpoints use one buffer."""
    snapshot_store = SnapshotStore(2)
    folder = str(tmp_path) if disk else None
    instead = "resumes from its last checkpoint" if disk else "starts over"
    for notes, steps in run_ranks(2, with_little_memory, snapshot_store.paths, folder, short):
        (note,) = notes
        assert note.startswith(f"no snapshots are taken, so after the loss of a rank the run {instead}: they need ")
        assert ([15, -1, -1] if disk else [-1, -1, -1]) == steps
    assert disk == bool(folder and checkpoints(tmp_path))
    snapshot_store.close()


def restarted(world, folder, paths, run_id):
    """The steps at which a run starts, first and when resumed without a snapshot; and its final weights."""
    start_steps = []
    sink = type(
        "Sink", (), {"emit": lambda _, event: isinstance(event, RunStarted) and start_steps.append(event.step)}
    )()
    options = options_of(checkpoint=folder, snapshot_paths=paths, sinks=[sink])
    train(world, seeded(Net), tensors(), run_id="mine", commands=stop_after(6), **options)
    model = seeded(Net)
    _, after = train(world, model, tensors(), run_id=run_id, from_snapshot=True, **options | {"snapshot_paths": ()})
    return start_steps, after


def test_without_a_snapshot_a_run_resumes_from_its_own_checkpoint(run_ranks, tmp_path):
    """And never from one of another run in the same folder."""
    for run_id, step in [("mine", 6), ("another", 0)]:
        snapshot_store = SnapshotStore(2)
        outcomes = run_ranks(2, restarted, str(tmp_path / run_id), snapshot_store.paths, run_id)
        assert [[0, step]] * 2 == [start_steps for start_steps, _ in outcomes]
        snapshot_store.close()
