"""Commands to a run from the notebook, and runs in the queue."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from gate import Gate
from shared_cluster import until
from tasks import classes, copied, net, same

import nbdist
from nbdist.errors import ClusterError, EngineError, PlanError

pytestmark = pytest.mark.engines

ENDLESS = 10**9


def begin(cluster, model, **options):
    given = {"loss": "cross_entropy", "steps": ENDLESS, "batch_size": 16, "threads": 1, **options}
    run = cluster.train(model, classes(), background=True, **given)
    until(lambda: run.progress.step > 3)
    return run


def ordered(records, run, rank=0):
    lines = (records / run.run_id / f"rank{rank}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "CommandApplied"]


def test_every_control_works_and_is_in_the_record(cluster, records, tmp_path):
    """Pause, rate, checkpoint, resume and stop, each on all ranks after the same step."""
    model = net()
    run = begin(cluster, model, lr=0.01)
    run.pause()
    until(lambda: run.state == "paused")
    step = run.progress.step
    run.set_lr(0.25)
    run.checkpoint(str(tmp_path / "asked"))
    until(lambda: any(h.kind == "checkpoint" for h in run.progress.happenings))
    assert ("paused", step) == (run.state, run.progress.step)
    kept = net()
    nbdist.load_checkpoint(str(tmp_path / "asked"), kept)
    run.resume()
    until(lambda: run.progress.step > step)
    assert 0.25 == run.progress.lr
    run.stop()
    run.wait()
    assert "stopped" == run.state
    kinds = ["pause", "lr", "checkpoint", "resume", "stop"]
    for rank in range(2):
        assert kinds == [event["command"] for event in ordered(records, run, rank)]
    assert ordered(records, run, 0)[1]["value"] == 0.25
    assert [e["step"] for e in ordered(records, run, 0)] == [e["step"] for e in ordered(records, run, 1)]
    assert not same(model, copied(kept))


@pytest.mark.parametrize(("folder", "place"), [(None, "checkpoints/{}"), ("~/asked", "asked")])
def test_a_checkpoint_has_a_place_of_its_own(cluster, tmp_path, monkeypatch, folder, place):
    """Without a folder it is below the working directory, under the run's name; ~ is the user's home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = begin(cluster, net())
    run.checkpoint(folder)
    until(lambda: any(h.kind == "checkpoint" for h in run.progress.happenings))
    run.stop()
    run.wait()
    assert (tmp_path / place.format(run.run_id) / "newest.json").exists()


@pytest.mark.parametrize("rate", [0, -1.0, "fast", True, float("nan"), float("inf"), None])
def test_a_rate_that_cannot_be_is_refused(cluster, rate):
    """No command is sent to the ranks."""
    run = begin(cluster, net())
    try:
        with pytest.raises(PlanError, match="is not possible: use a positive number"):
            run.set_lr(rate)
    finally:
        run.stop()
        run.wait()
    assert not [h for h in run.progress.happenings if "rate" in h.text]


def test_an_ended_run_refuses_commands(cluster):
    """The error says so; `stop` does nothing."""
    run = cluster.train(net(), classes(), loss="cross_entropy", steps=2)
    for command in (run.pause, run.resume, run.checkpoint):
        with pytest.raises(ClusterError, match=f"run {run.run_id} has finished"):
            command()
    run.stop()
    assert "finished" == run.state


def test_a_paused_run_survives_the_loss_of_a_rank(cluster):
    """It recovers, is still paused, with the commanded rate, and stops on command."""
    run = begin(cluster, net(), lr=0.01)
    run.set_lr(0.125)
    run.pause()
    until(lambda: run.state == "paused")
    for rank in (1, 0):
        os.kill(cluster.engines[rank].pid, signal.SIGKILL)
        until(lambda rank=rank: any(f"rank {rank} lost" in note for note in run.progress.notes))
        until(lambda: run.state == "paused")
    assert 0.125 == until(lambda: run.progress.lr)
    run.stop()
    run.wait()
    assert "stopped" == run.state


def test_replaced_ranks_apply_the_same_commands_again(cluster, tmp_path):
    """A rate that was changed before the loss counts from the same step: the bits of a run without the loss."""
    options = {"loss": "cross_entropy", "steps": 40, "batch_size": 16, "threads": 1, "lr": 0.01}
    gate, model, losses = Gate(tmp_path), net(), []

    def held(output, target):
        losses.append(None)
        if len(losses) in (10, 20):
            gate.hold(len(losses))
        return torch.nn.functional.cross_entropy(output, target)

    run = cluster.train(model, classes(), background=True, **options | {"loss": held})
    gate.wait(10, run=run)
    run.set_lr(0.002)
    gate.open(10)
    gate.wait(20, run=run)
    (change,) = until(lambda: [h for h in run.progress.happenings if "rate" in h.text])
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    gate.open(20)
    run.wait()
    step = int(change.text.split()[-1].replace(",", ""))
    assert any("rank 1 lost" in note for note in run.progress.notes), run
    expected = net()
    plain = cluster.train(expected, classes(), **options, lr_scheduler=dropping(step))
    assert "finished" == plain.state
    assert same(model, copied(expected))


def dropping(step):
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 if done < step else 0.2)


def test_runs_wait_for_their_turn(cluster):
    """Each starts when the one before has ended, from its weights; a foreground run is refused."""
    model = net()
    first = begin(cluster, model)
    second, third = (
        cluster.train(model, classes(), loss="cross_entropy", steps=3, batch_size=16, background=True) for _ in range(2)
    )
    assert ["queued", "queued"] == [second.state, third.state]
    assert [second, third] == cluster.queued
    assert first is nbdist.last_run()
    with pytest.raises(ClusterError, match="is queued"):
        cluster.train(model, classes(), loss="cross_entropy", steps=3)
    with pytest.raises(ClusterError, match="has not started: it can only be stopped"):
        second.pause()
    first.stop()
    third.wait()
    assert ["stopped", "finished", "finished"] == [first.state, second.state, third.state]
    assert first.progress.ended_s <= second.progress.started_s <= second.progress.ended_s <= third.progress.started_s
    assert third is nbdist.last_run()
    assert [] == cluster.queued


def test_a_queued_run_may_be_stopped(cluster):
    """It never starts; those behind it do."""
    first = begin(cluster, net())
    drawn = []
    second = cluster.train(
        net(), classes(), loss="cross_entropy", steps=3, background=True, watch=lambda r: drawn.append(r.state)
    )
    third = cluster.train(net(), classes(), loss="cross_entropy", steps=3, background=True)
    second.stop()
    assert second.wait() is second
    assert (["queued", "stopped"], 0) == (drawn, second.progress.step)
    first.stop()
    assert "finished" == third.wait().state


def test_a_queued_run_starts_though_the_one_before_failed(cluster):
    """One run's error does not affect the next."""

    def failing(output, target):
        raise ValueError("not today")

    first = begin(cluster, net())
    second = cluster.train(net(), classes(), loss=failing, steps=3, background=True)
    third = cluster.train(net(), classes(), loss="cross_entropy", steps=3, background=True)
    first.stop()
    with pytest.raises(EngineError, match="not today"):
        second.wait()
    assert "finished" == third.wait().state


def test_invalid_options_are_refused_before_a_run_is_queued(cluster):
    """At once, not when its turn comes."""
    first = begin(cluster, net())
    with pytest.raises(PlanError, match="unknown strategy"):
        cluster.train(net(), classes(), loss="cross_entropy", steps=3, strategy="dta", background=True)
    assert [] == cluster.queued
    first.stop()
    first.wait()


def test_queued_runs_end_with_the_engines(cluster):
    """`wait` returns."""
    first = begin(cluster, net())
    second = cluster.train(net(), classes(), loss="cross_entropy", steps=3, background=True)
    cluster.stop()
    second.wait()
    assert "stopped" == second.state
    assert ["the engines were stopped before it could start"] == second.progress.notes
    with pytest.raises(ClusterError, match="engines were stopped"):
        first.wait()
