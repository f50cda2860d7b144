"""The values of options: checked, and converted to what a plan holds."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from typing import Any

from nbdist.errors import PlanError, suggest

__all__ = ["as_int", "check_word", "check_yes_or_no", "positive_number", "steps_or_seconds", "whole_number"]

_SECONDS = {"s": 1, "min": 60, "h": 3600}


def as_int(value: Any) -> int:
    """A whole number of any type as an int; raises `TypeError` for others, and for True and False."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """The value of option `name` as an int, which may be no smaller than `least`.

    Raises:
        PlanError: It is no whole number, or smaller.
    """
    try:
        number = as_int(value)
    except TypeError:
        raise PlanError(f"{name} must be a whole number, not {value!r}.") from None
    if least is not None and number < least:
        raise PlanError(f"{name} {number} is too small: use {least} or more.")
    return number


def positive_number(name: str, value: Any) -> float:
    """The value of option `name` as a float.

    Raises:
        PlanError: It is no number above 0.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise PlanError(f"{name} must be a number, not {value!r}.") from None
    if not (math.isfinite(number) and number > 0):
        raise PlanError(f"{name} {value} must be a positive number.")
    return number


def steps_or_seconds(name: str, text: str) -> tuple[int, float]:
    """The value of option `name`, such as "200" or "5min", as steps or as seconds; the other one is 0.

    Raises:
        PlanError: It is neither.
    """
    found = re.fullmatch(r"(\d{1,18})|(\d{1,18}\.?\d*|\.\d+) ?(s|min|h)", text, re.ASCII)
    steps = int(found[1] or 0) if found else 0
    seconds = float(found[2]) * _SECONDS[found[3]] if found and found[2] else 0.0
    if not (steps or 0 < seconds < math.inf):
        raise PlanError(f"{name} {text!r} is neither steps nor a time: write 200, 90s, 5min or 1h.")
    return steps, seconds


def check_word(name: str, value: Any, words: Iterable[str]) -> None:
    """Raise `PlanError` if the value of option `name` is none of `words`."""
    known = list(words)
    if value not in known:
        raise PlanError(f"unknown {name} {value!r}: use {', '.join(known)}.{suggest(str(value), known)}")


def check_yes_or_no(name: str, value: Any) -> None:
    """Raise `PlanError` if the value of option `name` is neither True nor False."""
    if value not in (True, False):
        raise PlanError(f"{name} must be True or False, not {value!r}.")
