"""`%dist_runs`: past runs, from the record."""

from __future__ import annotations

import pytest

from nbdist.errors import PlanError
from nbdist.notebook.past_runs import runs_bundle
from nbdist.telemetry import PastRun, past_runs


def test_a_run_of_an_earlier_kernel_is_shown_again(notebook):
    """By the beginning of its name; the list shows how each run ended."""
    run = notebook("%dist_train model train_set --loss cross_entropy --epochs 2 --val test_set")
    notebook.printed()
    past = notebook(f"%dist_runs {run.run_id}")
    assert isinstance(past, PastRun)
    assert run.history == past.history
    bundle = runs_bundle(past_runs(1))
    line = bundle["text/plain"].splitlines()[1]
    assert line.startswith(f"nbdist: {run.run_id}")
    assert all(word in line for word in ("Net (21 parameters)", "dp=2", "finished", "4/4", "loss"))
    assert run.run_id in bundle["text/html"]
    notebook("%dist_runs -n 1")
    assert run.run_id in notebook.printed()


def test_there_may_be_none(notebook, home):
    """It names the folder."""
    notebook("%dist_runs")
    assert str(home / "runs") in notebook.printed()
    error, _ = notebook.fails("%dist_runs 2026")
    assert isinstance(error, PlanError)


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_count_that_cannot_be(notebook, count):
    """At least one."""
    error, _ = notebook.fails(f"%dist_runs -n {count}")
    assert "-n" in str(error)
