"""Formats numbers and durations for users."""

from __future__ import annotations

from typing import Any

__all__ = ["duration", "left", "number", "size", "span"]


def number(value: float | list[Any] | None, digits: int = 4) -> str:
    """A number for display: ``1234.5`` as "1,234", small ones with `digits` significant digits, None as a dash.

    Nested lists of numbers, such as a confusion matrix, are displayed by their size: "3×3 numbers".
    """
    if value is None:
        return "–"
    if isinstance(value, list):
        sizes: list[str] = []
        inner: Any = value
        while isinstance(inner, list):
            sizes.append(str(len(inner)))
            inner = inner[0] if inner else None
        return f"{'×'.join(sizes)} numbers"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds for display: "0.8 s", "12.3 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def span(seconds: float) -> str:
    """A short time for display: "1.2 ms", "340 ms", "2.5 s"; a long one as `duration`."""
    return duration(seconds) if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def size(nbytes: float) -> str:
    """An amount of memory for display: "0.3 MiB", "12 MiB", "1.5 GiB"."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.3g} MiB"


def left(seconds: float) -> str:
    """An estimated time left: "a few seconds", "about 40 s", "about 1 h 20 min"."""
    if seconds < 5:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds / 5) * 5} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    return f"about {minutes // 60} h {minutes % 60 // 10 * 10:02d} min"
