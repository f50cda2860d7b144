"""A function after each epoch, on a real cluster: in the notebook's thread, or on rank 0; and copies of the weights."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from shared_cluster import until
from tasks import classes, copied, net, same

from nbdist.errors import ClusterError, TaskError

pytestmark = pytest.mark.engines

OPTIONS = {"loss": "cross_entropy", "batch_size": 16, "threads": 1, "epochs": 3, "optimizer": "sgd", "lr": 0.1}


def test_it_runs_here_with_the_model_itself(cluster):
    """While the caller waits: in its thread, in evaluation mode, with the weights after that epoch."""
    model, seen = net(), []

    def show(given, row):
        seen.append((given is model, given.training, threading.current_thread(), row["epoch"], copied(given)))

    run = cluster.train(model, classes(), each_epoch=show, **OPTIONS)
    here = threading.current_thread()
    assert [(True, False, here, epoch) for epoch in (1, 2, 3)] == [call[:4] for call in seen]
    assert same(model, seen[-1][4])
    assert model.training
    without = net()
    cluster.train(without, classes(), **OPTIONS)
    assert same(without, copied(model))
    assert "show" == run.plan.each_epoch


def test_true_ends_the_run(cluster):
    """A note says so."""
    model = net()
    run = cluster.train(model, classes(), each_epoch=lambda model, row: row["epoch"] == 2, **OPTIONS)
    assert ("finished", 2) == (run.state, len(run.history))
    assert "the run ends early: each_epoch returned True" in run.progress.notes


def test_an_error_in_it_is_the_callers(cluster):
    """As it was raised; the run ends, and the model holds the weights of that epoch."""
    model, error, kept = net(), ValueError("no room for the plot"), []

    def show(model, row):
        kept.append(copied(model))
        raise error

    with pytest.raises(ValueError, match="no room for the plot") as caught:
        cluster.train(model, classes(), each_epoch=show, **OPTIONS)
    assert caught.value is error
    assert same(model, kept[0])
    cluster.check_ready()


def test_an_interrupt_in_it_stops_the_run(cluster):
    """Like one at any other time."""

    def show(model, row):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after step"):
        cluster.train(net(), classes(), each_epoch=show, **OPTIONS | {"epochs": 1000})
    cluster.check_ready()


def test_an_engine_that_dies_meanwhile(cluster):
    """Is replaced; the run trains the epoch again if it has to, calls once, and ends with the same bits."""
    model, calls = net(), []

    def show(given, row):
        calls.append(row["epoch"])
        if calls == [1]:
            killed = cluster.engines[1].pid
            os.kill(killed, signal.SIGKILL)
            until(lambda: cluster.engines[1].pid != killed)

    run = cluster.train(model, classes(), each_epoch=show, **OPTIONS)
    assert [1, 2, 3] == calls
    assert any("lost" in note for note in run.progress.notes)
    without = net()
    cluster.train(without, classes(), **OPTIONS)
    assert same(without, copied(model))


def test_in_the_background_it_runs_on_rank_0(cluster, tmp_path):
    """On a copy there."""
    marks = tmp_path

    def note(model, row):
        (marks / f"{os.getpid()} {row['epoch']} {model.training}").touch()

    pids = {engine.rank: engine.pid for engine in cluster.engines}
    cluster.train(net(), classes(), each_epoch=note, background=True, **OPTIONS).wait()
    assert {f"{pids[0]} {epoch} False" for epoch in (1, 2, 3)} == {path.name for path in marks.iterdir()}


def test_what_it_changes_would_be_lost(cluster):
    """So it is an error."""

    def clip(model, row):
        for parameter in model.parameters():
            parameter.clamp_(-0.01, 0.01)

    with pytest.raises(
        TaskError, match=r"each_epoch=clip changes parameter 0.weight of the model, which does not reach"
    ):
        cluster.train(net(), classes(), each_epoch=clip, **OPTIONS)


@pytest.mark.parametrize("strategy", ["dp=2", "shard=2"])
def test_the_average_is_a_state_dict(cluster, strategy):
    """Of the model; buffers are its last ones."""
    model = net()
    run = cluster.train(model, classes(), ema=0.5, strategy=strategy, **OPTIONS)
    other = net()
    other.load_state_dict(run.ema)
    assert [*model.state_dict()] == [*run.ema]
    for (name, buffer), averaged in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, averaged), name
    assert not torch.equal(model[3].weight, other[3].weight)
    with pytest.raises(
        ClusterError, match=r"has no moving average of the weights: run.ema is there after a run with ema"
    ):
        _ = cluster.train(net(), classes(), **OPTIONS).ema


def test_the_best_epoch_outlives_a_killed_engine(cluster, tmp_path):
    """It is kept in snapshots, beside the weights from which the run goes on."""
    killed = []

    def kill(given, row):
        if row["epoch"] == 3 and not killed:
            killed.append(cluster.engines[0].pid)
            os.kill(killed[0], signal.SIGKILL)
            until(lambda: cluster.engines[0].pid != killed[0])

    options = OPTIONS | {"val": classes(32), "lr": 3.0, "epochs": 5, "keep_best": "val_loss"}
    disturbed, quiet = net(), net()
    run = cluster.train(disturbed, classes(), each_epoch=kill, **options)
    again = cluster.train(quiet, classes(), **options)
    assert [row["val_loss"] for row in again.history] == [row["val_loss"] for row in run.history]
    assert same(quiet, copied(disturbed))
