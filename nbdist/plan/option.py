"""One option of a plan, as magics, the command line and the Python keywords know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Option", "option"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: what magics, the command line and the Python keywords know about it.

    Args:
        help: One sentence, with the unit.
        parse: Turns the word on a command line into a value.
        metavar: The placeholder shown in help.
        default: The default as a user reads it; the value itself is the Plan field's.
        many: Whether it takes several words.
        bare: Whether it may stand without a word, which then means True.
    """

    help: str
    parse: type = str
    metavar: str = "NAME"
    default: str | None = None
    many: bool = False
    bare: bool = False


def option(
    value: Any, help: str, *, parse: type = str, metavar: str = "NAME", default: str | None = None, many: bool = False,
    bare: bool = False,
) -> Any:  # fmt: skip
    """A field of a dataclass that carries its `Option`; `value` is the field's default."""
    shown = str(value) if default is None and value is not None else default
    """A field of a dataclass that carries its `Option`; `value` is the field's default."""
    told = Option(help=help, parse=parse, metavar=metavar, default=shown, many=many, bare=bare)
    return field(default=value, metadata={"option": told})
