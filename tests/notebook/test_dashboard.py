"""The display of a run, live and afterwards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import nbdist
from nbdist.cluster.runs.run import Run
from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RunSpec
from nbdist.errors import EngineError
from nbdist.notebook import dashboard
from nbdist.notebook.dashboard import LineDashboard, PanelDashboard, make_dashboard, remains
from nbdist.plan import Plan
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.run_view import SHOWN_RANKS

DATA = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)


def test_what_a_run_says_is_escaped(cluster):
    """An error message cannot become part of a page."""

    def hostile(output, target):
        raise ValueError("<script>alert(1)</script>")

    with pytest.raises(EngineError):
        cluster.train(nn.Linear(6, 3), DATA, loss=hostile)
    html = nbdist.last_run()._repr_html_()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html


def test_what_remains_needs_no_kernel(cluster):
    """HTML and text, which need no widget manager or script."""
    run = cluster.train(nn.Linear(6, 3), DATA, loss="cross_entropy", epochs=2, batch_size=16, val=DATA)
    kept = remains(run)
    assert {"text/html", "text/plain"} == set(kept)
    assert '<img alt="' in kept["text/html"]
    assert all(line.startswith("nbdist: ") for line in kept["text/plain"].splitlines())


def test_without_a_front_end_there_are_lines(notebook):
    """A shell in a terminal gets text."""
    assert isinstance(make_dashboard(notebook.shell), LineDashboard)


@pytest.mark.parametrize("count", [SHOWN_RANKS, SHOWN_RANKS + 1])
def test_a_panel_draws_many_ranks_less_often_than_the_run(notebook, count, monkeypatch):
    """Comparing all with each other costs most of an update; the first one and the last have them all."""
    monkeypatch.setattr(dashboard, "_SELDOM_EVERY_S", math.inf)  # however slow this machine is
    plan = Plan.create(ranks=count, cores=count, steps=100, batch_size=count)
    ranks = {rank: RankState(rank=rank) for rank in range(count)}
    progress = RunState(title="Net", plan=plan.to_dict(), ranks=ranks)
    run = Run(RunControl(RunSpec(run_id="many", task=None, plan=plan, title="Net"), progress, lambda *command: None))
    panel, drawn = PanelDashboard(), []
    for step in (1, 2, 3):
        if step == 3:
            progress.end("finished")
        progress.merge(*(RankState(rank=rank, step=step) for rank in range(count)))
        panel.update(run)
        drawn.append((panel._widget.head["facts"][0][1], panel._widget.rows["groups"][0][1][0][4]))
    second = "2" if count == SHOWN_RANKS else "1"
    assert drawn == [("1", "1"), ("2", second), ("3", "3")]
