"""Curves: few points for any number of steps."""

from __future__ import annotations

import pytest

from nbdist.telemetry import Curves, Point
from nbdist.telemetry.curves import POINTS, all_extended, extended


def at(step, loss):
    return Point(step, 1, loss, loss, loss)


@pytest.mark.parametrize("steps", [1, 2, 7, 31, 32, 33, 100, 1000])
def test_no_step_is_lost_and_points_are_few(steps):
    """The points are in order, count every step once, and keep the mean, the least and the greatest loss."""
    curve = ()
    for step in range(1, steps + 1):
        curve = extended(curve, [at(step, float(step % 10))], 32)
    assert len(curve) < 32
    assert steps == sum(point.steps for point in curve)
    ends = [sum(point.steps for point in curve[: i + 1]) for i in range(len(curve))]
    assert ends == [point.step for point in curve]
    mean = sum(point.mean * point.steps for point in curve) / steps
    assert sum(step % 10 for step in range(1, steps + 1)) / steps == pytest.approx(mean)
    losses = [float(step % 10) for step in range(1, steps + 1)]
    assert (min(losses), max(losses)) == (min(p.low for p in curve), max(p.high for p in curve))


def test_points_stand_for_as_many_steps_each():
    """The beginning of a long training is drawn as finely as its end."""
    curve = ()
    for step in range(1, 200_001, 50):
        curve = extended(curve, [Point(step + 49, 50, 1.0, 0.5, 2.0)])
    assert POINTS / 2 - 1 <= len(curve) < POINTS
    assert 1 == len({point.steps for point in curve[:-1]})


def test_losses_are_reported_once():
    """The losses since the last call, in few points for any number of steps."""
    curves = Curves()
    assert {} == curves.take()
    for step in range(1, 4):
        curves.add("loss", step, 1.0 / step)
    curves.add("kl", 3, 0.5)
    assert {"loss": (at(1, 1.0), at(2, 0.5), at(3, 1.0 / 3)), "kl": (at(3, 0.5),)} == curves.take()
    for step in range(4, 1004):
        curves.add("loss", step, 0.25)
    reported = curves.take()["loss"]
    assert (1000, 1003, True) == (sum(point.steps for point in reported), reported[-1].step, len(reported) < 32)
    assert {} == curves.take()


def test_curves_grow_by_name():
    """A name that comes later begins a curve; what steps log has fewer points than the loss, as there may be many."""
    curves = {}
    for step in range(1, 1001):
        curves = all_extended(curves, {"loss": (at(step, 1.0),)} | ({"kl": (at(step, 2.0),)} if step > 500 else {}))
    assert ["loss", "kl"] == list(curves)
    assert [1000, 500] == [sum(point.steps for point in curve) for curve in curves.values()]
    assert len(curves["kl"]) < 128 < len(curves["loss"]) < POINTS
