"""One option of a plan: its help, type and default, for magics, the command line and Python keywords."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Option", "option"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, for magics, the command line and Python keywords.

    Args:
        help: One sentence, with the unit.
        parse: Converts the word on a command line to a value.
        metavar: The placeholder shown in help.
        default: The default as a user reads it; the value itself is the Plan field's.
        many: Whether it takes several words.
        bare: Whether it may come without a word, which then means True.
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
    described = Option(help=help, parse=parse, metavar=metavar, default=shown, many=many, bare=bare)
    return field(default=value, metadata={"option": described})
