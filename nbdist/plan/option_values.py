"""The values of options: checked, and converted to what a plan holds."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from nbdist.errors import PlanError, suggest

__all__ = ["as_int", "check_word", "check_yes_or_no", "positive_number", "whole_number"]


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


def check_word(name: str, value: Any, words: Iterable[str]) -> None:
    """Raise `PlanError` if the value of option `name` is none of `words`."""
    known = list(words)
    if value not in known:
        raise PlanError(f"unknown {name} {value!r}: use {', '.join(known)}.{suggest(str(value), known)}")


def check_yes_or_no(name: str, value: Any) -> None:
    """Raise `PlanError` if the value of option `name` is neither True nor False."""
    if value not in (True, False):
        raise PlanError(f"{name} must be True or False, not {value!r}.")
