"""Charts of a run as SVG."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree

import pytest
from sample_events import FAST, ROW, SLOW, run_of

from nbdist.telemetry import Point
from nbdist.telemetry.curves import POINTS, extended
from nbdist.telemetry.svg_chart import loss_chart, value_charts


def curve_of(losses):
    return extended((), [Point(step, 1, loss, loss, loss) for step, loss in enumerate(losses, 1)])


def run_with(losses, history=(), **changes):
    return run_of(dataclasses.replace(FAST, curves={"loss": curve_of(losses)}, history=tuple(history), **changes), SLOW)


def parsed(svg):
    root = ElementTree.fromstring(svg)
    return root, {kind: root.findall(f".//*[@class='nbdist-{kind}']") for kind in ("train", "val", "band", "axis")}


def places(path):
    return [tuple(map(float, pair.split(","))) for pair in path.attrib["d"][1:].rstrip("Z").split("L")]


def test_nothing_is_drawn_of_nothing():
    """A run without a loss has no loss chart, a run without a metric no metric chart."""
    assert "" == loss_chart(run_with([]))
    assert "" == loss_chart(run_with([math.nan, math.inf]))
    assert [] == value_charts(run_with([1.0], [ROW]))


def test_the_line_goes_where_the_loss_went():
    """To the right with the steps, down with the loss; the title says it in words."""
    root, found = parsed(loss_chart(run_with([4.0, 2.0, 1.0])))
    assert "Loss over 3 steps: from 4 to 1" == root.attrib["aria-label"]
    (line,) = (element for element in found["train"] if element.tag.endswith("path"))
    xs, ys = zip(*places(line), strict=True)
    assert sorted(xs) == list(xs)
    assert sorted(ys) == list(ys)
    assert 640 - 86 == xs[-1], "it fills the picture"


def test_a_bad_beginning_does_not_flatten_the_rest():
    """A few losses far above all others are cut off at the top."""
    losses = [1e6, *(1 + 1 / step for step in range(1, 400))]
    (line,) = (e for e in parsed(loss_chart(run_with(losses)))[1]["train"] if e.tag.endswith("path"))
    ys = [y for _, y in places(line)]
    assert 10 == min(ys)
    assert max(ys) - min(ys[1:]) > 100


def test_where_points_stand_for_many_steps_a_band_shows_their_spread():
    """From the least to the greatest; one step alone has none."""
    assert not parsed(loss_chart(run_with([2.0, 1.0])))[1]["band"]
    _, found = parsed(loss_chart(run_with([1.0 + step % 2 for step in range(2000)])))
    (band,) = found["band"]
    assert len(places(band)) > POINTS / 2


def test_validation_stands_at_the_ends_of_epochs():
    """A point for each epoch with a value, the last value as text; a metric has a chart of its own."""
    rows = [{**ROW, "val_loss": 0.9, "val_accuracy": 0.5}, {**ROW, "val_loss": math.nan}, {**ROW, "val_loss": 0.7}]
    run = run_with([2.0] * 15 + [1.0] * 15, rows, steps_total=30)
    root, found = parsed(loss_chart(run))
    assert 2 == sum(element.tag.endswith("circle") for element in found["val"])
    assert root.attrib["aria-label"].endswith("on the validation data 0.7")
    (chart,) = value_charts(run)
    root, found = parsed(chart)
    assert "accuracy on the validation data: from 0.5 to 0.5" == root.attrib["aria-label"]
    assert "val 0.5" in [element.text for element in found["val"]]
    assert "accuracy" in [element.text for element in found["axis"]]


def test_what_steps_log_has_charts_of_its_own():
    """A chart for each name, with the values of training and those on the validation data."""
    run = run_with([1.0] * 10, [{**ROW, "kl": 3.0, "val_kl": 2.5}])
    (rank, *others) = run.ranks.values()
    rank = dataclasses.replace(rank, curves={**rank.curves, "kl": curve_of([4.0, 3.0]), "recon": curve_of([7.0])})
    kl, recon = map(parsed, value_charts(run_of(rank, *others)))
    assert "kl: from 4 to 3; kl on the validation data: from 2.5 to 2.5" == kl[0].attrib["aria-label"]
    assert "train 3" in [element.text for element in kl[1]["train"]]
    assert "val 2.5" in [element.text for element in kl[1]["val"]]
    assert "recon: from 7 to 7" == recon[0].attrib["aria-label"]


def test_a_long_name_stays_inside_its_chart():
    """It stands above the curve, and its end is left out where it would not fit."""
    run = run_with([1.0] * 10, [{**ROW, f"val_{name}": 0.5} for name in ("loss_discriminator", 60 * "x")])
    short, long = map(parsed, value_charts(run))
    assert "loss_discriminator" in [element.text for element in short[1]["axis"]]
    (text,) = [element.text for element in long[1]["axis"] if element.text and element.text.startswith("x")]
    assert text.endswith("x…")
    assert len(text) < 45


def test_a_run_without_a_curve_shows_its_epochs():
    """Such as one of another version, or one without events of rank 0."""
    root, _ = parsed(loss_chart(run_with([], [ROW, {**ROW, "loss": 0.25}])))
    assert root.attrib["aria-label"].startswith("Loss over 20 steps: from 0.5 to 0.25")


@pytest.mark.parametrize("losses", [[0.0], [0.0, 0.0], [-5.0, -5.0], [1e-12, 3e-12], [1e300, 1e299], [1.0] * 3])
def test_any_range_has_an_axis(losses):
    """One value, nothing but zeros, the very small and the very large."""
    _, found = parsed(loss_chart(run_with(losses)))
    texts = [element.text for element in found["axis"] if element.tag.endswith("text")]
    assert len(texts) >= 3


def test_it_stays_small_and_names_are_text():
    """For any number of steps, and any name of a metric."""
    losses = [2 / (1 + step / 1e4) + 0.1 * math.sin(step) for step in range(100_000)]
    assert len(loss_chart(run_with(losses, steps_total=100_000))) < 20_000
    name = 'val_<b> & "x"'
    (chart,) = value_charts(run_with([1.0], [{**ROW, name: 0.5}]))
    assert "<b>" not in chart
    parsed(chart)
