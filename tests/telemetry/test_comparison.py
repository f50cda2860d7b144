"""Runs side by side."""

from __future__ import annotations

import base64
import math
import re

import pytest
from sample_events import run_of

from nbdist.errors import PlanError
from nbdist.telemetry import Comparison, Point, RankState, Report, compare


class FixedReport(Report):
    """A report of a given state."""

    def __init__(self, run_id, progress):
        self.run_id = run_id
        self._progress = progress

    @property
    def progress(self):
        return self._progress


def rows(*losses, **more):
    """A history."""
    return tuple(
        {"epoch": e, "steps": 10, "samples": 320, "loss": 2 * loss, "seconds": 1.5, "val_loss": loss, **more}
        for e, loss in enumerate(losses, 1)
    )


def report(run_id="r", history=(), title="", **plan):
    curve = tuple(Point(step, 1, 2.0 / step, 1.0, 3.0) for step in range(1, 11))
    run = run_of(RankState(rank=0, history=history, curves={"loss": curve}))
    run.plan = {**run.plan, "mesh": {"dp": 2}, "lr": 0.1, "optimizer": "sgd", **plan}
    run.title = title or run.title
    return FixedReport(run_id, run)


@pytest.fixture
def sweep():
    return {
        0.1: report(history=rows(3.0, 1.0, 2.0)),
        0.01: report(lr=0.01, history=rows(3.0, 2.5)),
        "broken": report(lr=9.0, history=rows(math.nan, 4.0)),
        "none": report(lr=None),
    }


def test_what_differs_and_the_best_epochs(sweep):
    """Only the options that differ, and of each run the epoch with the lowest loss on the validation data."""
    compared = compare(sweep)
    assert ("val_loss", "0.1") == (compared.measure, compared.best)
    lines = [line.split() for line in repr(compared).splitlines()]
    assert "nbdist: 4 runs: the lowest val_loss is 1, of 0.1 in epoch 2" == repr(compared).splitlines()[0]
    assert ["nbdist:", "run", "lr", "state", "steps", "best", "epoch", "loss", "val_loss", "took"] == lines[1]
    assert [["0.1", "0.1", "2", "2", "1"], ["0.01", "0.01", "2", "5", "2.5"], ["broken", "9", "2", "8", "4"],
            ["none", "–", "–", "–", "–"]] == [[*line[1:3], *line[5:8]] for line in lines[2:]]  # fmt: skip


def test_the_frame_has_a_row_for_each_run(sweep):
    """With the values themselves."""
    frame = compare(sweep).to_frame()
    assert ("run", ["0.1", "0.01", "broken", "none"]) == (frame.index.name, list(frame.index))
    assert [0.1, 0.01, 9.0] == list(frame["lr"])[:3]
    assert [1.0, 2.5, 4.0] == list(frame["val_loss"])[:3]


def test_models_and_meshes_may_differ():
    """The mesh stands for the strategy word."""
    runs = [
        report("a", title="Net", strategy="data"),
        report("b", title="Other", strategy="shard", mesh={"dp": 1, "shard": 2}),
    ]
    lines = repr(compare(runs)).splitlines()
    assert "nbdist: 2 runs: none has completed an epoch" == lines[0]
    assert ["nbdist:", "run", "model", "mesh", "state"] == lines[1].split()[:5]
    assert ["nbdist:", "b", "Other", "shard=2"] == lines[3].split()[:4]


def test_runs_without_validation_are_compared_by_their_loss():
    """So are all, if one has none."""
    plain = tuple({key: value for key, value in row.items() if key != "val_loss"} for row in rows(1.0, 0.5))
    compared = compare({"with": report(history=rows(2.0)), "without": report(history=plain)})
    assert ("loss", "without") == (compared.measure, compared.best)


def test_a_notebook_shows_table_and_curves(sweep):
    """Names are escaped; a chart for the training loss and one for the validation data, with a line for each run."""
    shown = compare({"<b>": sweep[0.1], **sweep})._repr_html_()
    assert shown.count("<img alt=") == 2
    assert "&lt;b&gt;" in shown
    assert "<b>:" not in shown
    assert shown.count("<tr>") == 6
    assert "<img" not in compare([report("r")])._repr_html_().partition("</p>")[0]


def test_one_run_may_be_given_alone(sweep):
    """Under its id."""
    assert ["r"] == list(compare(sweep[0.1]).runs) == list(compare(iter([sweep[0.1]])).runs)
    assert isinstance(compare(sweep[0.1]), Comparison)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "compare takes a dict or a list of runs, not 3"),
        ([], "compare takes at least one run, and here is none"),
        ({"a": 3}, "compare takes runs, or their ids, and 3 is neither"),
        (["2026"], "there is no record of a run '2026'"),
    ],
)
def test_what_is_no_run_is_refused(home, given, message):
    """In one sentence."""
    with pytest.raises(PlanError, match=message):
        compare(given)


def test_charts_name_runs_by_what_differs():
    """Ids of one day begin alike; of many runs the first have labels, as far as they fit."""
    runs = [report(f"20261129-22{i:04}-5af4ec", history=rows(1.0 + i)) for i in range(30)]
    few = base64.b64decode(re.findall(r"base64,([^\"]+)", compare(runs[:2])._repr_html_())[0]).decode()
    assert all(text in few for text in (">0-5af4ec ", ">1-5af4ec "))
    many = base64.b64decode(re.findall(r"base64,([^\"]+)", compare(runs)._repr_html_())[0]).decode()
    assert all(0 <= float(y) <= 200 for y in re.findall(r'class="nbdist-run\d" x="[\d.]+" y="([-\d.]+)"', many))


def test_a_row_without_a_value_is_not_the_best():
    """A metric may have none in an epoch."""
    history = rows(2.0, 1.0)
    compared = compare({"r": report(history=({**history[0]}, {**history[1], "val_loss": None}))})
    assert "the lowest val_loss is 2, of r in epoch 1" in repr(compared)
