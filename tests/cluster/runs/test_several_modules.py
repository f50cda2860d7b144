"""Two modules with an optimizer each, trained through a cluster: what is loaded into the notebook's."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from gate import Gate
from two_modules import EPOCHS, SCHEDULERS, by_hand, pair, state_of, step, task_of

from nbdist.core.task.modules import Modules
from nbdist.core.task.task import Task
from nbdist.errors import EngineError

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def train(cluster, monkeypatch):
    """Trains a task of several modules, as `Cluster.train` would one of its options."""

    def train(task, **options):
        monkeypatch.setattr(Task, "of_options", lambda _model, _data, given, **_names: (task, given | task.options))
        return cluster.train(task.given, None, **options)

    return train


def task_with(**changes):
    """A task with the user's own optimizers."""
    return replace(task_of(pair()), own_optimizers=True, **changes)


@pytest.mark.parametrize("strategy", ["data", "shard", "pipeline"])
def test_modules_and_optimizers_are_loaded_in_place(train, strategy):
    """The user's own objects end with the results of a plain loop."""
    task = task_with()
    parameters = list(task.model.parameters())
    run = train(task, strategy=strategy, epochs=EPOCHS)
    assert "Sequential + Sequential (443 parameters)" == run.control.spec.title
    torch.testing.assert_close(state_of(task), by_hand(), **EXACT)
    assert all(a is b for a, b in zip(parameters, task.model.parameters(), strict=True))
    assert {*parameters} == {*task.optimizers["body"].state, *task.optimizers["head"].state}


def test_an_engine_that_is_killed_between_two_optimizers(cluster, train, tmp_path):
    """The step is done again, as a whole."""
    gate = Gate(tmp_path, 5, scheduler=SCHEDULERS["body"])  # it holds ranks when the first optimizer has stepped
    task = task_with(schedulers={**SCHEDULERS, "body": gate})
    run = train(task, epochs=EPOCHS, background=True)
    gate.wait(5, run=run)
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    gate.open(5)
    assert "finished" == run.wait().state
    torch.testing.assert_close(state_of(task), by_hand(), **EXACT)


def test_after_an_error_the_last_complete_step_is_there(train):
    """In both modules and both optimizers."""
    calls = []

    def failing(modules, batch):
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("torn")
        return step(modules, batch)

    task = task_with()
    with pytest.raises(EngineError, match=r"ValueError: torn .*\nThe model holds the weights after step 4, "):
        train(replace(task, model=Modules(task.given, failing)), epochs=EPOCHS)
    expected = task_with()
    train(expected, steps=4)
    state, complete = state_of(task), state_of(expected)
    torch.testing.assert_close(state, {name: complete[name] for name in state}, **EXACT)
    assert {4.0} == {float(one["step"]) for one in task.optimizers["head"].state.values()}
