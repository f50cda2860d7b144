"""Curves of the loss and of what steps log, downsampled: no more points than a chart shows, however long the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from nbdist.telemetry.events import Point

__all__ = ["POINTS", "Curve", "Curves", "all_extended", "extended", "joined"]

Curve = tuple[Point, ...]

POINTS = 256
"""A curve has fewer points than this; when it reaches this number, each two neighbours are joined."""
_OWN_POINTS = 128  # of a curve that a step logs, of which there may be many
_POINTS_PER_EVENT = 16
_POINTS_PER_LINE = 32  # of the record


def extended(curve: tuple[Point, ...], points: Iterable[Point], limit: int = POINTS) -> tuple[Point, ...]:
    """`curve` and then `points`, in fewer than `limit` points of about the same number of steps each.

    Args:
        curve: The result of an earlier call, or empty.
        points: Later steps, in order.
        limit: Greater than one.
    """
    longer = list(curve)
    for point in points:
        if len(longer) > 1 and longer[-1].steps + point.steps <= longer[0].steps:
            longer[-1] = _joined(longer[-1], point)
        else:
            longer.append(point)
        if len(longer) >= limit:
            pairs = zip(longer[::2], [*longer[1::2], None], strict=False)
            longer = [left if right is None else _joined(left, right) for left, right in pairs]
    return tuple(longer)


def all_extended(curves: Mapping[str, Curve], more: Mapping[str, Iterable[Point]]) -> dict[str, Curve]:
    """Curves by name, each with the later points of its name; that of the loss has more of them than others."""
    changed = {
        name: extended(curves.get(name, ()), points, POINTS if name == "loss" else _OWN_POINTS)
        for name, points in more.items()
    }
    return {**curves, **changed}


def joined(curves: Mapping[str, Curve], more: Mapping[str, Iterable[Point]]) -> dict[str, Curve]:
    """The curves of several events, as one event would hold them."""
    longer = {name: extended(curves.get(name, ()), points, _POINTS_PER_LINE) for name, points in more.items()}
    return {**curves, **longer}


def _joined(left: Point, right: Point) -> Point:
    steps = left.steps + right.steps
    mean = left.mean + (right.mean - left.mean) * right.steps / steps
    return Point(right.step, steps, mean, min(left.low, right.low), max(left.high, right.high))


class Curves:
    """Collects the numbers of each step until the next `take`."""

    def __init__(self) -> None:
        self._fresh: dict[str, list[tuple[int, float]]] = {}

    def add(self, name: str, step: int, value: float) -> None:
        """The mean over all ranks in `step`, counted from 1. Cheap enough for every step."""
        self._fresh.setdefault(name, []).append((step, value))

    def take(self) -> dict[str, Curve]:
        """The numbers since the last call, by name, in a few points of equally many steps each."""
        taken, self._fresh = self._fresh, {}
        return {name: tuple(_points(fresh)) for name, fresh in taken.items()}


def _points(fresh: list[tuple[int, float]]) -> Iterator[Point]:
    size = len(fresh) // (_POINTS_PER_EVENT - 1) + 1
    return (_point(fresh[first : first + size]) for first in range(0, len(fresh), size))


def _point(steps: list[tuple[int, float]]) -> Point:
    losses = [loss for _, loss in steps]
    return Point(steps[-1][0], len(steps), sum(losses) / len(losses), min(losses), max(losses))
