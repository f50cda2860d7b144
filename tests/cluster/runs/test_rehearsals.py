"""Rehearsals on a cluster: the notebook's own objects stay as they are, and so does its last run."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from gate import Gate
from problems import ADAMW, classes, mlp

import nbdist
from nbdist.errors import ClusterError, EngineError

OPTIONS = {"loss": "cross_entropy", "batch_size": 8, "epochs": 3, "optimizer": ADAMW}
rows = []


def kept(model, row):
    rows.append(row["loss"])
    assert not model.training


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_notebook_is_as_before(cluster):
    """The model, what a function keeps, and the last run, from which another may resume."""
    model = mlp()
    trained = cluster.train(model, classes(40), **OPTIONS)
    before, records = copied(model), len(nbdist.past_runs())
    run = cluster.train(model, classes(40), val=classes(20), each_epoch=kept, rehearse=True, **OPTIONS)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert ("finished", []) == (run.state, rows)
    assert run.progress.title.startswith("rehearsal of Sequential")
    first, expected, memory = run.progress.notes
    assert "rehearsed: 2 steps, an evaluation of 2 batches, each_epoch (kept), a checkpoint" in first
    assert "3 epochs of 5 steps take about" in expected
    assert memory.startswith("memory: a rank needs up to")
    assert nbdist.last_run() is trained
    assert records == len(nbdist.past_runs())
    assert 4 == len(cluster.resume(epochs=4).history)


def fails(model, row):
    raise KeyError("val_f1")


def test_what_fails_in_the_notebook_fails_now(cluster):
    """As in the run: the user's own error, and the cluster is ready for the next one."""
    model = mlp()
    before = copied(model)
    with pytest.raises(KeyError, match="val_f1"):
        cluster.train(model, classes(40), each_epoch=fails, rehearse=True, **OPTIONS)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(EngineError, match="judge"):
        cluster.train(model, classes(40), val=classes(8), evaluate=judge, rehearse=True, check="no", **OPTIONS)
    assert "finished" == cluster.train(model, classes(40), **OPTIONS).state


def judge(model, batch):
    return {"judge": "good"}


def test_it_takes_no_commands_and_survives_a_lost_engine(cluster, tmp_path):
    """It begins again, and nothing of it is left."""
    model, gate = mlp(), Gate(tmp_path, 1)
    before = copied(model)
    run = cluster.train(model, classes(40), rehearse=True, background=True, lr_scheduler=gate, **OPTIONS)
    gate.wait(1, ranks=2, run=run)
    with pytest.raises(ClusterError, match="is a rehearsal, which can only be stopped: lr needs a training"):
        run.set_lr(0.1)
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    gate.open(1)
    assert "finished" == run.wait().state
    assert any("lost" in note for note in run.progress.notes)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
