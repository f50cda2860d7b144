"""The report of a run, as tables and plots."""

from __future__ import annotations

import sys

import matplotlib as mpl
import pytest
from sample_events import run_of

from nbdist.errors import PlanError
from nbdist.telemetry import Point, RankState, Report

mpl.use("agg")


class FixedReport(Report):
    """A report of a given state."""

    def __init__(self, progress):
        self._progress = progress

    @property
    def progress(self):
        return self._progress


ROWS = tuple(
    {"epoch": e, "steps": 10, "samples": 320, "loss": 2.0 / e, "seconds": 1.5, "val_loss": 2.2 / e} for e in (1, 2)
)
CURVE = tuple(Point(step, 1, 2.0, 1.0, 3.0) for step in range(1, 21))


@pytest.fixture
def report():
    return FixedReport(run_of(RankState(rank=0, history=ROWS, curves={"loss": CURVE})))


def test_the_history_is_a_frame(report):
    """One row an epoch."""
    frame = report.to_frame()
    assert ("epoch", [1, 2]) == (frame.index.name, list(frame.index))
    assert ["steps", "samples", "loss", "seconds", "val_loss"] == list(frame.columns)
    assert [2.0, 1.0] == list(frame["loss"])


def test_a_run_without_an_epoch_has_an_empty_frame():
    """It does not break a loop over runs."""
    assert 0 == len(FixedReport(run_of(RankState(rank=0))).to_frame())
    assert 0 == len(FixedReport(run_of(RankState(rank=0))).to_frame(steps=True))


def test_the_curve_is_a_frame(report):
    """One row a point, by step."""
    frame = report.to_frame(steps=True)
    assert list(range(1, 21)) == list(frame.index)
    assert ["steps", "loss", "low", "high"] == list(frame.columns)


def test_the_loss_is_drawn_over_steps(report):
    """Train and validation on one scale."""
    axes = report.plot()
    train, val = axes.get_lines()
    assert list(range(1, 21)) == list(train.get_xdata())
    assert [10, 20] == list(val.get_xdata())
    assert ["train", "validation"] == [text.get_text() for text in axes.get_legend().get_texts()]


def test_it_is_drawn_where_one_wants_it(report):
    """Two runs in one plot."""
    axes = report.plot()
    assert axes is report.plot(axes)
    assert 4 == len(axes.get_lines())


@pytest.mark.parametrize(("package", "method"), [("pandas", "to_frame"), ("matplotlib.pyplot", "plot")])
def test_a_missing_package_is_named(report, monkeypatch, package, method):
    """With the cure."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PlanError, match=f"needs {package.split('.')[0]}: pip install"):
        getattr(report, method)()
