"""The monitored number of a history."""

from __future__ import annotations

import math

import pytest

from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.plan.monitor import Monitor


@pytest.mark.parametrize(
    ("text", "name", "higher"),
    [("val_loss", "val_loss", False), ("val_accuracy", "val_accuracy", True), ("size : max", "size", True)],
)
def test_its_name_says_what_is_better(text, name, higher):
    """Or a word behind it."""
    assert Monitor(option="keep_best", name=name, higher=higher) == Monitor.parse("keep_best", text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("val_size", r"^keep_best 'val_size' says not whether val_size is to fall or to rise: add :min or :max"),
        ("val_loss:3", r"^keep_best 'val_loss:3' names no number of the history: write its name, as in val_loss"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, sentence):
    """Before anything is trained."""
    with pytest.raises(PlanError, match=sentence):
        Plan.create(ranks=2, cores=2, epochs=9, keep_best=text)


def test_a_number_that_is_no_number_is_never_better():
    """And any other is better than it."""
    monitor = Monitor.parse("keep_best", "val_loss")
    assert [monitor.improves(*pair) for pair in [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 1.0)]] == [
        True, False, False, False,
    ]  # fmt: skip
    assert monitor.improves(9.0, math.nan)
    assert not monitor.improves(math.nan, math.nan)


def test_a_row_without_it():
    """Names the option, and what there is."""
    with pytest.raises(TaskError, match=r"^keep_best looks at val_loss, which the history has not: it has epoch, loss"):
        Monitor.parse("keep_best", "val_loss").value({"epoch": 1, "loss": 2.0})
