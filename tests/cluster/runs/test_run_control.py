"""A run without engines: its commands, its arguments, its end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbdist.cluster.runs.run import Run, resume_arguments
from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RunSpec
from nbdist.core.task.task import Task
from nbdist.errors import ClusterError, PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.command_table import COMMANDS


@pytest.fixture
def given():
    """The commands that the run has given."""
    return []


@pytest.fixture
def run(given):
    """A running run that was started with some options."""
    plan = Plan.create(ranks=1, cores=1)
    task = Task.create(nn.Linear(1, 1), (torch.ones(4, 1), torch.ones(4, 1)), loss="mse")
    spec = RunSpec(run_id="r", task=task, plan=plan, title="Net")
    progress = RunState(title="Net", plan=plan.to_dict(), ranks={0: RankState(rank=0)}, state="running")
    arguments = {"model": nn.Linear(1, 1), "data": (), "names": ("m", "d"), "epochs": 3, "clip_norm": 1.0}
    return Run(RunControl(spec, progress, lambda control, kind, value: given.append((kind, value)), arguments))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_given_by_its_name(run, given, name):
    """With a value if it takes one."""
    value = {"checkpoint": "/tmp/here", "lr": 0.5, "scale": 2}.get(name)
    run.give(name, value)
    assert [(name, value)] == given


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", None, "the command lr needs a value: RATE."),
        ("pause", 3, "the command pause takes no value, and 3 was given: leave it out."),
        ("paus", None, "unknown command 'paus': use pause, resume, checkpoint, stop, lr, scale. Did you mean 'pause'?"),
    ],
)
def test_a_wrong_command_is_not_given(run, given, name, value, message):
    """The error says what it takes."""
    with pytest.raises(PlanError) as refused:
        run.give(name, value)
    assert (message, []) == (str(refused.value), given)


def test_the_options_of_the_last_run_change_or_are_left_out(run):
    """None leaves one out; of steps and epochs the one given counts."""
    assert 1.0 == resume_arguments(run, {})["clip_norm"]
    assert resume_arguments(run, {"clip_norm": None})["clip_norm"] is None
    changed = resume_arguments(run, {"steps": 7})
    assert (7, None, True) == (changed["steps"], changed.get("epochs"), changed["resume"])
    assert 3 == resume_arguments(run, {"steps": None})["epochs"]


def test_an_ended_run_holds_no_task_and_takes_no_command(run):
    """Its data, and what was unpacked of another kernel's, are freed."""
    run.control.end("finished")
    run.control.release()
    assert run.control.spec.task is None
    with pytest.raises(ClusterError, match="run r has finished: start another one"):
        run.pause()
