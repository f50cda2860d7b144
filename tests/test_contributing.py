"""The lists of CONTRIBUTING: who edits the files they name, and no other, has an option or a command everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nbdist

PACKAGE = Path(nbdist.__file__).parent
PAGE = PACKAGE.parent / ".github" / "CONTRIBUTING.md"

OPTION = {
    "nbdist/plan/plan.py": (
        "    gather: bool = option(",
        '    halves: int | None = option(None, "How often.", parse=int, metavar="H", default="never")\n',
    ),
    "nbdist/plan/train_options.py": ("    gather: bool | None\n", "    halves: int | None\n"),
}
USE_OPTION = """
import inspect, nbdist, torch
from nbdist.notebook.completion import complete_line
from nbdist.notebook.parsers import TRAIN

for function in (nbdist.train, nbdist.Cluster.train):
    assert "halves" in inspect.signature(function).parameters
    assert "halves: How often. Default: never." in function.__doc__
assert "--halves H" in TRAIN.format_help()
assert ["--halves"] == complete_line("%dist_train model data --hal", {})[1]
data = torch.ones(4, 2), torch.ones(4, 1)
result = nbdist.train(torch.nn.Linear(2, 1), data, loss="mse", halves=3, record=False, verbose=False)
assert 3 == result.plan.halves
"""

COMMAND = {
    "nbdist/telemetry/command_table.py": (
        '    "lr": CommandKind(',
        '    "twice": CommandKind(usage="twice", method="twice", applied="rate doubled", asked="", label="Twice"),\n',
    ),
    "nbdist/cluster/runs/run.py": (
        "    def set_lr(",
        '    def twice(self) -> None:\n        """Double."""\n        self.control.command("twice")\n\n',
    ),
    "nbdist/core/control/step_control.py": (
        '            case "lr":\n',
        '            case "twice":\n                self._schedulers.set_rate(2 * self._schedulers.rate)\n',
    ),
}
USE_COMMAND = """
import torch
from nbdist.cluster.runs.run import Run
from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RunSpec
from nbdist.core.comm.world import World
from nbdist.core.control.commands import Command, Commands
from nbdist.core.task.task import Task
from nbdist.core.train import fit
from nbdist.notebook import panel_view
from nbdist.notebook.completion import complete_line
from nbdist.notebook.parsers import RUN
from nbdist.telemetry import ListSink, RankState, RunState, fold

assert "twice" in RUN.format_help()
assert ["twice"] == complete_line("%dist_run tw", {})[1]
assert "Twice" in [button["label"] for button in panel_view.buttons()]

class Given(Commands):
    def __init__(self): self.commands = [Command("twice")]
    def new(self): given, self.commands = self.commands, []; return given

data = torch.ones(4, 2), torch.ones(4, 1)
task, options = Task.of_options(torch.nn.Linear(2, 1), data, {"loss": "mse", "lr": 0.25, "optimizer": "sgd"})
from nbdist.plan import Plan
plan, sink, state = Plan.create(ranks=1, cores=1, **options), ListSink(), RankState(rank=0)
fit(task, plan, World(), sinks=[sink], commands=Given())
for event in sink.events:
    state = fold(state, event)
assert 0.5 == task.optimizers[""].param_groups[0]["lr"]
assert "rate doubled after step 1" in [happening.text for happening in state.happenings]

given = []
progress = RunState(title="Net", plan=plan.to_dict(), ranks={0: state}, state="running")
spec = RunSpec(run_id="r", task=task, plan=plan, title="Net")
Run(RunControl(spec, progress, lambda *command: given.append(command[1:]))).give("twice")
assert [("twice", None)] == given
"""


def listed(what):
    """The files of nbdist that the page lists for it."""
    section = PAGE.read_text().partition(f"\n{what}:\n")[2].partition("\n`%dist_")[0]
    return set(re.findall(r"`(nbdist/[\w/]+\.py)`", section))


def assert_is_everywhere(edits, script, folder, home):
    shutil.copytree(PACKAGE, folder / "nbdist", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (anchor, line) in edits.items():
        source = (folder / name).read_text()
        assert 1 == source.count(anchor), name
        (folder / name).write_text(source.replace(anchor, line + anchor))
    env = {**os.environ, "PYTHONPATH": str(folder), "NBDIST_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert 0 == done.returncode, done.stderr


@pytest.mark.programs
def test_a_new_option_is_everywhere(tmp_path, home):
    """In magic, completion, help, both functions and the plan."""
    assert listed("An option of a training") == {*OPTION, "nbdist/cluster/runs/run_spec.py"}
    assert_is_everywhere(OPTION, USE_OPTION, tmp_path, home)


@pytest.mark.programs
def test_a_new_command_is_everywhere(tmp_path, home):
    """In magic, completion, panel, run, record and on the ranks."""
    assert listed("A command to a running training") == {*COMMAND}
    assert_is_everywhere(COMMAND, USE_COMMAND, tmp_path, home)
