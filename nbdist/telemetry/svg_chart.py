"""Charts as SVG: a run's loss, its metrics and what its steps log, and curves of several runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from nbdist.telemetry.curves import Curve
from nbdist.telemetry.events import Point
from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.units import number

__all__ = ["SVG_COLORS", "Pairs", "curves_chart", "loss_chart", "value_charts"]

_RUNS = ("#3b82c4", "#d9772b", "#3f9b57", "#b35fb8", "#c9544f", "#8a7f2d", "#5f7fa8", "#9b6b4f")
SVG_COLORS = {"train": _RUNS[0], "val": _RUNS[1], "axis": "#808080"} | {f"run{i}": c for i, c in enumerate(_RUNS)}
"""Of lines and texts: readable on white and on dark, because an image does not know its page's theme."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 86, 10, 26
_LINE = 13  # pixels from one label to the next
_BELOW_NAME = 26
_TICKS = 5
_TICK_WIDTH = 55
_CHARACTER = 6.6  # pixels, of the texts
_VALUE_CHARTS = 8
_SPARED = 0.02
"""The share of the highest losses that may lie outside, so that a bad beginning does not flatten the rest."""
_STEEP = 20.0
"""They lie outside only if they would make the range this many times as large."""

Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class _Frame:
    """Maps numbers to pixels of the chart."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    top: int = _TOP

    def at(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.up(y):.1f}"

    def across(self, x: float) -> float:
        low, high = self.x
        return _LEFT + (self.width - _LEFT - _RIGHT) * (x - low) / ((high - low) or 1.0)

    def up(self, y: float) -> float:
        low, high = self.y
        share = min(max((y - low) / ((high - low) or 1.0), 0.0), 1.0)
        return self.height - _BOTTOM - (self.height - _BOTTOM - self.top) * share


def loss_chart(run: RunState, *, width: int = 640, height: int = 180) -> str:
    """The training loss, with its least and greatest value at each point, and the validation loss.

    Returns:
        An ``<svg>``, empty where there is nothing to draw yet.
    """
    curve = [point for point in run.curve if math.isfinite(point.mean)]
    ends = _ends(run)
    if not curve:
        rows = zip(ends, run.history, strict=True)
        epochs = [(int(step), float(row["loss"]), row["steps"]) for step, row in rows if math.isfinite(row["loss"])]
        curve = [Point(step, steps, loss, loss, loss) for step, loss, steps in epochs]
    val = _measured(run, "val_loss", ends)
    if not curve:
        return ""
    train = [(float(point.step), point.mean) for point in curve]
    band = [point for point in curve if math.isfinite(point.low) and math.isfinite(point.high)]
    heights = [y for _, y in train] + [y for _, y in val]
    frame = _Frame(width, height, (0.0, max(x for x, _ in train + val)), _range(heights, [p.low for p in band]))
    title = f"Loss over {curve[-1].step:,} steps: from {number(train[0][1])} to {number(train[-1][1])}"
    if val:
        title += f"; on the validation data {number(val[-1][1])}"
    drawn = [_axes(frame, "step"), _band(frame, band), _line(frame, train, "train"), _line(frame, val, "val", True)]
    labels = [("train", "train", train[-1][1])] + ([("val", "val", val[-1][1])] if val else [])
    return _svg(frame, title, [*drawn, *_labels(frame, labels)])


def value_charts(run: RunState, *, width: int = 320, height: int = 180) -> list[str]:
    """Charts of the metrics on the validation data, and of what steps log: in training, and on that data.

    Args:
        run: The run.
        width: Of each, in pixels.
        height: Of each, in pixels.
    """
    ends, curves = _ends(run), run.curves
    numbers = [name for row in run.history for name, value in row.items() if not isinstance(value, list)]
    measured = [name.removeprefix("val_") for name in numbers if name.startswith("val_")]
    names = [name for name in dict.fromkeys([*measured, *curves]) if name != "loss"]
    drawn = (
        _value_chart(name, curves.get(name, ()), _measured(run, f"val_{name}", ends), width, height)
        for name in names[:_VALUE_CHARTS]
    )
    return [chart for chart in drawn if chart]


def _value_chart(name: str, curve: Curve, val: Pairs, width: int, height: int) -> str:
    train = [(float(point.step), point.mean) for point in curve if math.isfinite(point.mean)]
    if not train and not val:
        return ""
    points = train + val
    frame = _Frame(width, height, (0.0, max(x for x, _ in points)), _range([y for _, y in points], []), top=_BELOW_NAME)
    lines, labels, titles = [], [], list[str]()
    heading = _text(_LEFT, _LINE, "start", _clipped(name, (width - _LEFT) / _CHARACTER))
    for kind, pairs, where in (("train", train, ""), ("val", val, " on the validation data")):
        if pairs:
            lines.append(_line(frame, pairs, kind, dots=kind == "val"))
            labels.append((kind, kind, pairs[-1][1]))
            titles.append(f"{name}{where}: from {number(pairs[0][1])} to {number(pairs[-1][1])}")
    return _svg(frame, "; ".join(titles), [_axes(frame, "step"), heading, *lines, *_labels(frame, labels)])


def curves_chart(title: str, curves: Mapping[str, Pairs], *, width: int = 400, height: int = 200) -> str:
    """Curves of several runs over their steps; empty where there is nothing to draw.

    Args:
        title: What is drawn.
        curves: Pairs of step and value by the run's name; one without pairs is left out.
        width: In pixels.
        height: In pixels.
    """
    kinds = {name: f"run{number % len(_RUNS)}" for number, name in enumerate(curves)}
    drawn = {name: finite for name, pairs in curves.items() if (finite := [p for p in pairs if math.isfinite(p[1])])}
    if not drawn:
        return ""
    points = [pair for pairs in drawn.values() for pair in pairs]
    frame = _Frame(width, height, (0.0, max(x for x, _ in points)), _range([y for _, y in points], []))
    lines = [_line(frame, pairs, kinds[name], dots=True) for name, pairs in drawn.items()]
    short = _short_names(drawn)
    labels = [(kinds[name], short[name], pairs[-1][1]) for name, pairs in drawn.items()][: (height - _TOP) // _LINE]
    return _svg(frame, title, [_axes(frame, "step"), *lines, *_labels(frame, labels)])


def _short_names(names: Iterable[str], most: int = 8) -> dict[str, str]:
    """Names of few characters: without what all begin with, such as the day of runs' ids."""
    known = list(names)
    begin = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*known, strict=False))
    same = len(list(begin)) if len(known) > 1 and max(map(len, known)) > most else 0
    shown = {name: name[same:] if same > 2 else name for name in known}
    return {name: text if len(text) <= most else text[: most - 1] + "…" for name, text in shown.items()}


def _ends(run: RunState) -> list[float]:
    """The last step of each row of the history."""
    return list(itertools.accumulate(float(row["steps"]) for row in run.history))


def _measured(run: RunState, name: str, ends: Sequence[float]) -> Pairs:
    pairs = [(end, row.get(name)) for end, row in zip(ends, run.history, strict=True)]
    return [(end, float(value)) for end, value in pairs if value is not None and math.isfinite(value)]


def _range(heights: list[float], lows: list[float]) -> tuple[float, float]:
    """The range of the vertical axis."""
    low, high = min([*heights, *lows]), max(heights)
    usual = sorted(heights)[max(0, math.ceil(len(heights) * (1 - _SPARED)) - 1)]
    if usual > low and high - low > _STEEP * (usual - low):
        high = usual
    if high == low:
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    margin = 0.04 * (high - low)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _ticks(low: float, high: float, most: float) -> list[float]:
    """Round numbers between two others, about `most` of them."""
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(x: float, y: float, anchor: str, text: str, kind: str = "axis") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{SVG_COLORS[kind]}"'
    return f'<text class="nbdist-{kind}" {place}>{escape(text)}</text>'


def _axes(frame: _Frame, unit: str) -> str:
    right, bottom, color = frame.width - _RIGHT, frame.height - _BOTTOM, SVG_COLORS["axis"]
    parts = []
    for y in _ticks(*frame.y, _TICKS):
        at = frame.up(y)
        strong = ' stroke-opacity="0.25"'
        parts.append(f'<path class="nbdist-axis" d="M{_LEFT},{at:.1f}H{right}" stroke="{color}"{strong}/>')
        parts.append(_text(_LEFT - 6, at + 4, "end", number(y)))
    parts.append(f'<path class="nbdist-axis" d="M{_LEFT},{bottom}H{right}" stroke="{color}"/>')
    free = -math.inf
    for x in _ticks(*frame.x, (right - _LEFT) / _TICK_WIDTH):
        if x != int(x):
            continue
        text, at = _count(x), frame.across(x)
        half = len(text) * _CHARACTER / 2
        if at - half > free:
            parts.append(_text(at, bottom + 16, "middle", text))
            free = at + half + 8
    parts.append(_text(frame.width - 6, bottom + 16, "end", unit))
    return "".join(parts)


def _count(x: float) -> str:
    """A step, short: "500", "20k", "1.5M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if x >= size:
            unit = {"G": 1e9, "M": 1e6, "k": 1e3}[letter]
            return f"{x / unit:g}{letter}"
    return f"{x:,.0f}"


def _band(frame: _Frame, points: list[Point]) -> str:
    if not any(point.high > point.low for point in points):
        return ""
    there = [frame.at(point.step, point.high) for point in points]
    back = [frame.at(point.step, point.low) for point in reversed(points)]
    color = SVG_COLORS["train"]
    return f'<path class="nbdist-band" d="M{"L".join([*there, *back])}Z" fill="{color}" fill-opacity="0.2"/>'


def _line(frame: _Frame, pairs: Pairs, kind: str, dots: bool = False) -> str:
    color = SVG_COLORS[kind]
    path = "L".join(frame.at(x, y) for x, y in pairs)
    drawn = ""
    if len(pairs) > 1:
        drawn = f'<path class="nbdist-{kind}" d="M{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'
    few = len(pairs) <= 40
    if (dots and few) or len(pairs) == 1:
        places = (frame.at(x, y).split(",") for x, y in pairs)
        drawn += "".join(f'<circle class="nbdist-{kind}" cx="{x}" cy="{y}" r="2.6" fill="{color}"/>' for x, y in places)
    return drawn


def _labels(frame: _Frame, ends: Iterable[tuple[str, str, float]]) -> list[str]:
    """Name and last value of each line (kind, name, value), beside its end, moved apart where they would overlap."""
    sorted_ends = sorted(ends, key=lambda end: frame.up(end[2]))
    heights: list[float] = []
    for _, _, value in sorted_ends:
        heights.append(max(frame.up(value) + 4, heights[-1] + _LINE if heights else -math.inf))
    lift = max(0.0, heights[-1] - (frame.height - _BOTTOM))
    return [
        _text(frame.width - _RIGHT + 8, y - lift, "start", f"{name} {_short(value)}", kind)
        for y, (kind, name, value) in zip(heights, sorted_ends, strict=True)
    ]


def _clipped(text: str, most: float) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= most else f"{text[: int(most) - 1]}…"


def _short(value: float) -> str:
    """A number of few characters."""
    if value and abs(value) < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits}e{int(exponent)}"
    return number(value, 3)


def _svg(frame: _Frame, title: str, parts: Iterable[str]) -> str:
    size = f'width="{frame.width}" height="{frame.height}" viewBox="0 0 {frame.width} {frame.height}"'
    style = 'font-family="system-ui, sans-serif" font-size="11"'
    words = escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="nbdist-chart" role="img" aria-label="{words}" {size} {style}>'
        f"<title>{words}</title>{''.join(parts)}</svg>"
    )
