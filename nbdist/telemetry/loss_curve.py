"""The loss curve, downsampled: no more points than a chart shows, however long the training."""

from __future__ import annotations

from collections.abc import Iterable

from nbdist.telemetry.events import Point

__all__ = ["POINTS", "Losses", "extended", "joined"]

POINTS = 256
"""A curve has fewer points than this; when it reaches this number, each two neighbours are joined."""
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


def joined(points: tuple[Point, ...], more: Iterable[Point]) -> tuple[Point, ...]:
    """The points of several events, as one event would hold them."""
    return extended(points, more, _POINTS_PER_LINE)


def _joined(left: Point, right: Point) -> Point:
    steps = left.steps + right.steps
    mean = left.mean + (right.mean - left.mean) * right.steps / steps
    return Point(right.step, steps, mean, min(left.low, right.low), max(left.high, right.high))


class Losses:
    """Collects the loss of each step until the next `take`."""

    def __init__(self) -> None:
        self._fresh: list[tuple[int, float]] = []

    def add(self, step: int, loss: float) -> None:
        """The loss over all ranks of `step`, counted from 1. Cheap enough for every step."""
        self._fresh.append((step, loss))

    def take(self) -> tuple[Point, ...]:
        """The losses since the last call, in a few points of equally many steps each."""
        fresh, self._fresh = self._fresh, []
        size = len(fresh) // (_POINTS_PER_EVENT - 1) + 1
        return tuple(_point(fresh[first : first + size]) for first in range(0, len(fresh), size))


def _point(steps: list[tuple[int, float]]) -> Point:
    losses = [loss for _, loss in steps]
    return Point(steps[-1][0], len(steps), sum(losses) / len(losses), min(losses), max(losses))
