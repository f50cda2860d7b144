"""Step control: commands to a running training, applied on all ranks after the same step."""

from __future__ import annotations

import functools
import threading
import time

import pytest
import torch
from problems import ADAMW, SGD, Given, alone, assert_same_bits, classes, mlp, train
from torch.optim import lr_scheduler

from nbdist.core.control.commands import Command
from nbdist.core.optim.lr_schedulers import Schedulers
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.telemetry import Checkpointed, CommandApplied, EpochFinished, ListSink, Noted, Progress

DATA = classes(24)
OPTIONS = {"batch_size": 6, "shuffle": False}


def on(run_ranks, ranks, function, *args, **options):
    return run_ranks(ranks, functools.partial(function, **options), *args)


def applied(events):
    return [(event.command, event.value, event.step) for event in events if isinstance(event, CommandApplied)]


def commanded(world, by_step, optimizer=SGD, **options):
    sink = ListSink()
    commands = Given(by_step if world.rank == 0 else {})
    result, trained = train(
        world, mlp(), DATA, optimizer=optimizer, commands=commands, sinks=[sink], **OPTIONS, **options
    )
    return result, trained, sink.events, commands.stamps


def in_plain_torch(rates):
    """Plain torch: the learning rate of each step."""
    model = mlp()
    optimizer = SGD(model.parameters())
    x, y = DATA
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        rows = slice(6 * (step % 4), 6 * (step % 4) + 6)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_new_rate_counts_from_the_next_step(run_ranks, ranks):
    """The same as in plain PyTorch; every rank reports the command, and the new rate."""
    rates = [0.05, 0.05, 0.2, 0.2, 0.2, 0.1]
    for _, trained, events, stamps in on(run_ranks, ranks, commanded, {2: [("lr", 0.2)], 5: [("lr", 0.1)]}, steps=6):
        torch.testing.assert_close(trained, in_plain_torch(rates), rtol=1e-12, atol=1e-12)
        assert [("lr", 0.2, 2), ("lr", 0.1, 5)] == applied(events)
        assert pytest.approx(0.1) == [event.lr for event in events if isinstance(event, Progress)][-1]
        assert stamps in ([(0, 2), (1, 5)], [])


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)


def warmed(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 30)], milestones=[5])


SCHEDULERS = {
    "step": functools.partial(lr_scheduler.StepLR, step_size=7, gamma=0.5),
    "exponential": functools.partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "lambda": functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "cosine": functools.partial(lr_scheduler.CosineAnnealingLR, T_max=30),
    "one cycle": one_cycle,
    "warm-up, then cosine": warmed,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_scheduler_continues_from_a_new_rate(name, tensor):
    """All later rates of all groups are what they would have been, times the same factor."""

    def rates_of(change_at):
        first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        rate = torch.tensor(0.05) if tensor else 0.05
        groups = [{"params": [first], "lr": rate}, {"params": [second], "lr": rate / 2}]
        optimizer = torch.optim.AdamW(groups, lr=rate, capturable=False, foreach=False)
        schedulers = Schedulers({"": optimizer}, {"": SCHEDULERS[name]})
        rates = []
        for step in range(30):
            if step == change_at:
                schedulers.set_rate(3 * schedulers.rate)
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            schedulers.end_update()
        return torch.tensor(rates)

    plain, changed = rates_of(None), rates_of(12)
    assert torch.equal(plain[:12], changed[:12])
    torch.testing.assert_close(3 * plain[12:], changed[12:], rtol=1e-5, atol=1e-12)


def test_a_rate_of_zero_may_be_left():
    """Without a scheduler there is no factor: all groups get the rate."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.0}])
    Schedulers({"": optimizer}, {}).set_rate(0.5)
    assert 0.5 == optimizer.param_groups[0]["lr"]


class CommandsInPause(Given):
    """A pause, then further commands after so many seconds of it."""

    def __init__(self, pause_at, then, seconds):
        super().__init__({pause_at: ["pause"]})
        self.then, self.seconds = then, seconds
        self.timer, self.paused = None, False
        self.ready = threading.Event()

    def new(self):
        commands = super().new()
        if self.paused and self.timer is None:
            self.timer = threading.Timer(self.seconds, self.ready.set)
            self.timer.start()
        self.paused = self.paused or bool(commands)
        if self.ready.is_set() and self.then:
            then, self.then = self.then, []
            commands = [Command(kind, value) for kind, value in then]
        return commands


def paused(world, pause_at, then, seconds, **options):
    sink = ListSink()
    began_s = time.perf_counter()
    result, trained = train(
        world,
        mlp(),
        DATA,
        optimizer=ADAMW,
        commands=CommandsInPause(pause_at, then, seconds),
        sinks=[sink],
        **OPTIONS,
        **options,
    )
    return result, trained, sink.events, time.perf_counter() - began_s


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pause_changes_no_bit_and_takes_no_time(run_ranks, ranks):
    """All ranks wait until "resume"; a row's seconds count training only."""
    expected = on(run_ranks, ranks, commanded, {}, ADAMW, epochs=2)[0][1]
    for result, trained, events, seconds in on(run_ranks, ranks, paused, 3, [("resume", None)], 0.5, epochs=2):
        assert_same_bits(expected, trained)
        assert [("pause", None, 3), ("resume", None, 3)] == applied(events)
        assert seconds > 0.5
        assert sum(row["seconds"] for row in result.history) < seconds - 0.5


def test_a_paused_training_applies_commands(run_ranks, tmp_path):
    """It sets another rate, writes a checkpoint, and stops, without a step in between."""
    then = [("lr", 0.5), ("checkpoint", str(tmp_path)), ("stop", None)]
    for result, _, events, _ in on(run_ranks, 2, paused, 3, then, 0.1, epochs=2):
        assert ("stopped", 3) == (result.state, result.history[-1]["steps"])
        assert [("pause", None, 3), *((kind, value, 3) for kind, value in then)] == applied(events)
    assert [3] == [event.step for event in events if isinstance(event, Checkpointed)] or events[0].rank == 1
    _, trained = alone(mlp(), DATA, optimizer=ADAMW, resume=str(tmp_path), epochs=2, **OPTIONS)
    assert trained


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("planned", [False, True])
def test_a_run_can_resume_from_a_commanded_checkpoint(run_ranks, tmp_path, ranks, planned):
    """With or without planned checkpoints; an event reports it once it is on disk, and it changes no bit."""
    own = {"checkpoint": str(tmp_path / "own"), "checkpoint_every": 2} if planned else {}
    folder = str(tmp_path / "asked")
    plain = on(run_ranks, ranks, commanded, {}, ADAMW, epochs=2)[0]
    outcomes = on(run_ranks, ranks, commanded, {3: [("checkpoint", folder)]}, ADAMW, epochs=2, **own)
    for _, trained, events, _ in outcomes:
        assert_same_bits(plain[1], trained)
        assert [("checkpoint", folder, 3)] == applied(events)
    written = [event for event in outcomes[0][2] if isinstance(event, Checkpointed) and event.path.startswith(folder)]
    assert [3] == [event.step for event in written]
    resumed = on(run_ranks, ranks, commanded, {}, ADAMW, epochs=2, resume=folder)
    assert_same_bits(plain[1], resumed[0][1])


def test_a_checkpoint_that_cannot_be_written_ends_nothing(run_ranks, tmp_path):
    """A note gives the user the reason."""
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "below")
    for result, _, events, _ in on(run_ranks, 2, commanded, {2: [("checkpoint", folder)]}, steps=4):
        assert "finished" == result.state
        (note,) = {event.text for event in events if isinstance(event, Noted)}
        assert note.startswith("no checkpoint was written, the run continues: rank 0 cannot write to")


class StampedLog(Given):
    """Commands with the stamps of an earlier attempt."""

    def __init__(self, commands):
        super().__init__({})
        self.commands = commands

    def new(self):
        commands, self.commands = self.commands, []
        return commands


def replayed(world, paths, commands, from_snapshot, **options):
    sink = ListSink()
    result, trained = train(
        world, mlp(), DATA, optimizer=ADAMW, commands=StampedLog(commands), run_id="r", snapshot_paths=paths,
        from_snapshot=from_snapshot, sinks=[sink], **OPTIONS, **options,
    )  # fmt: skip
    return result, trained, sink.events


@pytest.mark.parametrize("at", [2, 3, 4, 5])
def test_a_recovery_applies_stamped_commands_again(run_ranks, at):
    """From a snapshot before, at, or after a command: the same bits, whichever step ranks were lost in."""
    commands = [Command("lr", 0.03, 3), Command("pause", None, 4), Command("resume", None, 4), Command("lr", 0.02, 4)]
    snapshot_store = SnapshotStore(2)
    expected = on(run_ranks, 2, replayed, [], commands, False, steps=7)[0][1]
    on(
        run_ranks,
        2,
        replayed,
        snapshot_store.paths,
        [*(o for o in commands if o.step <= at), Command("stop", None, at)],
        False,
        steps=7,
    )
    # The snapshot counts the stop, which came last, as applied.
    for _, trained, _ in run_ranks(2, resumed_without_stop, snapshot_store.paths, commands, at):
        assert_same_bits(expected, trained)
    snapshot_store.close()


def resumed_without_stop(world, paths, commands, at):
    """Resume as if the stop had not been among the applied commands."""
    before = [command for command in commands if command.step <= at]
    later = [command for command in commands if command.step > at]
    return replayed(world, paths, [*before, Command("resume", None, at), *later], True, steps=7)


def test_a_stop_outlives_the_ranks(run_ranks):
    """After a snapshot in which the stop was applied, no further step runs."""
    snapshot_store = SnapshotStore(2)
    commands = [Command("stop", None, 3)]
    first = on(run_ranks, 2, replayed, snapshot_store.paths, commands, False, epochs=2)
    for result, trained, events in on(run_ranks, 2, replayed, snapshot_store.paths, commands, True, epochs=2):
        assert "stopped" == result.state
        assert_same_bits(first[0][1], trained)
        assert 3 == sum(event.row["steps"] for event in events if isinstance(event, EpochFinished))
    snapshot_store.close()


@pytest.mark.parametrize(
    ("commands", "state", "ranks"),
    [
        ([("scale", 3), ("scale", 4)], "scaled", 4),
        ([("scale", 3), ("scale", 2)], "finished", 0),
        ([("scale", 2)], "finished", 0),
        ([("scale", 3), "stop"], "stopped", 0),
        (["stop", ("scale", 3)], "stopped", 0),
    ],
)
def test_of_several_scale_commands_the_last_one_counts(run_ranks, commands, state, ranks):
    """If all come in one step; a stop overrides them. Each of them is reported."""
    for result, _, events, _ in on(run_ranks, 2, commanded, {2: commands}, steps=5):
        assert (state, ranks) == (result.state, result.ranks)
        assert [(o, None, 2) if isinstance(o, str) else (*o, 2) for o in commands] == applied(events)


def scaled_before(world):
    """Started over without a snapshot, on the number of ranks of the last "scale"."""
    return replayed(world, [], [Command("scale", 3, 2), Command("lr", 0.03, 3), Command("scale", 2, 4)], True, steps=6)


def test_a_superseded_scale_command_is_not_applied_again(run_ranks):
    """Else the two would restart the training back and forth for ever. It is still reported."""
    for result, _, events in run_ranks(2, scaled_before):
        assert ("finished", 0) == (result.state, result.ranks)
        assert [("scale", 3, 2), ("lr", 0.03, 3), ("scale", 2, 4)] == applied(events)
