"""The training loop: history, events, stopping, and the model that a run leaves behind."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import SGD, Given, alone, assert_same_bits, classes, mlp, stop_after, train, weights

from nbdist.core import fit
from nbdist.core.comm.world import World
from nbdist.core.task.task import Task
from nbdist.plan import Plan
from nbdist.telemetry import (
    EpochFinished,
    Evaluating,
    ListSink,
    Progress,
    RankState,
    RunFailed,
    RunFinished,
    RunStarted,
    fold,
)

DATA = classes(20)


def stopped_run(world, step):
    commands, sink = Given({step if world.rank == 0 else 1: ["stop"]}), ListSink()
    result, trained = train(
        world,
        mlp(),
        DATA,
        optimizer=SGD,
        batch_size=4,
        epochs=3,
        val=DATA,
        shuffle=False,
        commands=commands,
        sinks=[sink],
    )
    return result, trained, sink.events


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_stop_stops_all_after_the_same_step(run_ranks, step):
    """Rank 0 reads it; all end after that step, with its weights, a row for the partial epoch and no validation."""
    steps = dict.fromkeys(("epoch", "steps", "samples"), 0)
    expected = alone(mlp(), DATA, optimizer=SGD, batch_size=4, steps=step, shuffle=False, accumulate=3)[1]
    for result, trained, events in run_ranks(3, stopped_run, step):
        assert "stopped" == result.state
        torch.testing.assert_close(trained, expected, rtol=1e-12, atol=1e-12)
        assert [{**steps, "epoch": e, "steps": s, "samples": 4 * s} for e, s in {3: [(1, 3)], 5: [(1, 5)],
                7: [(1, 5), (2, 2)]}[step]] == [{key: row[key] for key in steps} for row in result.history]  # fmt: skip
        assert "val_loss" not in result.history[-1]
        assert RunFinished(rank=events[-1].rank, state="stopped", time_s=events[-1].time_s) == events[-1]


def test_a_stop_after_the_last_step_is_a_finish():
    """All steps were complete: the run is finished, not stopped."""
    result, _ = alone(mlp(), DATA, optimizer=SGD, batch_size=10, commands=stop_after(2))
    assert ("finished", 2) == (result.state, result.history[0]["steps"])


@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 4}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("command", "ranks"), [("stop", 0), (("scale", 3), 3)], ids=["stop", "scale"])
def test_a_command_in_the_last_step_does_not_change_the_end(command, ranks, length):
    """The last evaluation still runs; the result has the requested number of ranks."""
    options = {"optimizer": SGD, "batch_size": 10, "val": classes(7), **length}
    undisturbed, expected = alone(mlp(), DATA, **options)
    result, trained = alone(mlp(), DATA, commands=Given({4: [command]}), **options)
    assert ("finished", ranks) == (result.state, result.ranks)
    assert_same_bits(expected, trained)
    without = [{key: value for key, value in row.items() if key != "seconds"} for row in undisturbed.history]
    assert without == [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]
    assert "val_loss" in without[-1]


def rows_and_events(world):
    sink = ListSink()
    result, _ = train(
        world, mlp(), DATA, optimizer=SGD, batch_size=6, epochs=2, val=classes(7), metric="accuracy", sinks=[sink]
    )
    return result, sink.events


def plain_epochs(epochs, steps):
    """The plain loop: one step of the scheduler after each pass over the data."""
    model = mlp()
    optimizer = SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(epochs):
        for x, y in list(zip(DATA[0].split(8), DATA[1].split(8), strict=True))[:steps]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps -= 1
        scheduler.step()
    return weights(model)


@pytest.mark.parametrize(("length", "epochs", "steps"), [({"epochs": 3}, 3, 9), ({"steps": 8}, 3, 8)])
@pytest.mark.parametrize("first", [1, 3, 4])
def test_a_scheduler_of_epochs_is_that_of_the_plain_loop(tmp_path, length, epochs, steps, first):
    """Whether a run's length is in epochs or steps, and across a resume in, at the end of, and after an epoch."""
    options = {
        "optimizer": SGD, "batch_size": 8, "shuffle": False, "schedule_by": "epoch",
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "checkpoint": str(tmp_path),
    }  # fmt: skip
    expected = plain_epochs(epochs, steps)
    torch.testing.assert_close(alone(mlp(), DATA, **options, **length)[1], expected, rtol=1e-12, atol=1e-12)
    stopped = alone(mlp(), DATA, **options, **length, commands=stop_after(first))[0]
    assert "stopped" == stopped.state
    again = alone(mlp(), DATA, **options, **length, resume=str(tmp_path))[1]
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_history_is_the_same_on_every_rank(run_ranks, ranks):
    """One row per epoch with these columns in this order, counted over all ranks."""
    results = [result for result, _ in run_ranks(ranks, rows_and_events)]
    assert ["epoch", "steps", "samples", "loss", "seconds", "val_loss", "val_accuracy"] == list(results[0].history[0])
    assert [(1, 4, 20), (2, 4, 20)] == [(row["epoch"], row["steps"], row["samples"]) for row in results[0].history]
    assert all(row["seconds"] > 0 for row in results[0].history)
    assert [results[0].history] * ranks == [result.history for result in results]


def test_events_describe_the_run(run_ranks):
    """Each rank emits its start, progress, evaluation and end; folded, they give its last state."""
    for rank, (result, events) in enumerate(run_ranks(2, rows_and_events)):
        kinds = [type(event) for event in events]
        assert [RunStarted, RunFinished] == [kinds[0], kinds[-1]]
        epochs = [kind for kind in kinds if kind in (Evaluating, EpochFinished)]
        assert [Evaluating, EpochFinished] * 2 == epochs
        assert {rank} == {event.rank for event in events}
        assert 8 == events[0].steps_total
        state = RankState(rank=rank)
        for event in events:
            state = fold(state, event)
        samples = (22, 18)[rank]  # each epoch's last batch, of two, is one slice, which is rank 0's
        assert ("finished", 8, 2, samples) == (state.state, state.step, state.epoch, state.samples)
        assert tuple(result.history) == state.history
        last = [event for event in events if isinstance(event, Progress)][-1]
        assert last.memory_mib > 1
        assert last.samples_per_s > 0


def test_the_seed_decides_everything():
    """The same seed gives the same bits whatever was drawn before; another seed gives other bits."""
    options = {"optimizer": SGD, "batch_size": 6}
    first = alone(mlp(dropout=0.5), DATA, **options, seed=1)[1]
    torch.rand(3)
    assert_same_bits(first, alone(mlp(dropout=0.5), DATA, **options, seed=1)[1])
    other = alone(mlp(dropout=0.5), DATA, **options, seed=2)[1]
    assert not torch.equal(first["0.weight"], other["0.weight"])


def drawing(model, batch):
    drawing.drawn.append(torch.rand(()).item())
    return model(batch[0]).square().mean()


def draw(world, accumulate):
    drawing.drawn = []
    train(world, mlp(), DATA, step=drawing, optimizer=SGD, batch_size=8, accumulate=accumulate)
    return drawing.drawn


def test_every_slice_has_random_numbers_of_its_own(run_ranks):
    """No two slices share a dropout mask, and a slice's mask does not depend on its rank."""
    expected = draw(World(), 2)
    assert 6 == len(set(expected))
    assert [expected[0::2], expected[1::2]] == run_ranks(2, draw, 1)


def test_a_trained_model_is_an_ordinary_one():
    """No hooks, no gradients, the same parameter objects, and a second run continues from the first."""
    model = mlp()
    parameters = list(model.parameters())
    alone(model, DATA, optimizer=SGD, steps=1, batch_size=6)
    assert all(mine is now for mine, now in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in parameters)
    once = weights(model)
    assert not torch.equal(once["0.weight"], alone(model, DATA, optimizer=SGD, steps=1, batch_size=6)[1]["0.weight"])


def test_an_optimizer_of_the_users_keeps_its_state():
    """A ready-made optimizer continues where it was: two runs of one epoch equal one run of two."""
    model, other = mlp(), mlp()
    optimizer = SGD(model.parameters())
    for _ in range(2):
        alone(model, DATA, optimizer=optimizer, batch_size=5, shuffle=False)
    assert_same_bits(weights(model), alone(other, DATA, optimizer=SGD, batch_size=5, epochs=2, shuffle=False)[1])


def fail_in_the_third_slice(model, batch):
    fail_in_the_third_slice.calls += 1
    if fail_in_the_third_slice.calls == 3:
        raise ZeroDivisionError("in the step")
    return model(batch[0]).square().mean()


def test_a_failing_step_is_reported_and_leaves_nothing():
    """The error is raised unchanged, the record has it, and model and threads are as before."""
    model, sink, threads = mlp(), ListSink(), torch.get_num_threads()
    model.eval()
    fail_in_the_third_slice.calls = 0
    task = Task.create(model, DATA, step=fail_in_the_third_slice, optimizer=SGD, batch_size=4)
    plan = Plan.create(ranks=1, cores=1, threads=threads + 1, **task.options)
    with pytest.raises(ZeroDivisionError, match="in the step"):
        fit(task, plan, World(), sinks=[sink])
    assert isinstance(sink.events[-1], RunFailed)
    assert "ZeroDivisionError: in the step" == sink.events[-1].error
    assert threads == torch.get_num_threads()
    assert not model.training
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def threads_in_step(model, batch):
    threads_in_step.seen.add(torch.get_num_threads())
    return model(batch[0]).square().mean()


def test_the_plan_decides_the_threads():
    """The step runs on as many threads as the plan says, whatever the process used before."""
    threads_in_step.seen = set()
    task = Task.create(mlp(), DATA, step=threads_in_step, optimizer=SGD)
    fit(task, Plan.create(ranks=1, cores=7, **task.options), World())
    assert {7} == threads_in_step.seen
