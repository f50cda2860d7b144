"""One option of a training: its help, type and default, for magics, the command line and Python keywords."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from nbdist.errors import PlanError, suggest

__all__ = ["Option", "check_known", "explained", "flag", "option", "options_of", "takes_options"]

F = TypeVar("F", bound=Callable[..., Any])
_WIDTH = 108


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, for magics, the command line and Python keywords.

    Args:
        help: One sentence, with the unit; other options in it stand in backticks.
        parse: Converts the word on a command line to a value.
        metavar: The placeholder shown in help.
        default: The default as a user reads it; the value itself is the field's.
        many: Whether it takes several words.
        bare: Whether it may come without a word, which then means True.
        words: Its possible or best known words, for completion and errors.
        read: How a magic reads its word in the notebook: as "text", or as an "amount", which may be a number too; as a
            "callable" of the notebook or a known word; as an expression with a "value", which may be "quotable"; as a
            "path", in which ``{name}`` stands for a value.
        of_task: Whether it describes the task (what is trained), not only the plan.
        elsewhere: Its names in other trainers: whoever writes one of these is told this option's name.
    """

    help: str
    parse: type = str
    metavar: str = "NAME"
    default: str | None = None
    many: bool = False
    bare: bool = False
    words: tuple[str, ...] = ()
    read: str = "text"
    of_task: bool = False
    elsewhere: tuple[str, ...] = ()


def option(value: Any, help: str, *, default: str | None = None, **described: Any) -> Any:
    """A field of a dataclass that carries its `Option`; `value` is the field's default.

    Args:
        value: The default.
        help: See `Option`.
        default: How it is shown; as it is, unless given.
        **described: The other arguments of `Option`.
    """
    shown = str(value) if default is None and value is not None else default
    return field(default=value, metadata={"option": Option(help=help, default=shown, **described)})


def options_of(described: type) -> dict[str, Option]:
    """The options among the fields of a dataclass, in their order."""
    return {f.name: f.metadata["option"] for f in fields(described) if "option" in f.metadata}


def flag(name: str) -> str:
    """An option as a word on a line."""
    return "--" + name.replace("_", "-")


def explained(
    option: Option, mention: Callable[[str], str] = lambda name: f"`{name}`", words: Mapping[str, str] | None = None
) -> str:
    """An option's sentence and default.

    Args:
        option: The option.
        mention: How other options are written in it.
        words: How defaults are written, if not as they are in Python.
    """
    default = option.default if words is None else words.get(option.default or "", option.default)
    text = f"{option.help} Default: {default}." if default else option.help
    return re.sub(r"`(\w+)`", lambda found: mention(found[1]), text)


def check_known(names: Iterable[str], known: Mapping[str, Option]) -> None:
    """Raise `PlanError` for a name that is no option, with the nearest one that is."""
    for name in names:
        if name not in known:
            meant = [option for option, about in known.items() if name in about.elsewhere]
            raise PlanError(f"unknown option {name!r}.{suggest(name, known, meant)}")


def takes_options(options: Mapping[str, Option]) -> Callable[[F], F]:
    """Decorate a function that takes ``**options``: its signature and docstring then show each of them.

    Type checkers read the annotation of ``**options``, a `TypedDict`; help and completion read these.
    """
    described = "\n".join(
        textwrap.fill(f"{name}: {explained(option)}", _WIDTH, subsequent_indent=" " * 4)
        for name, option in options.items()
    )

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in options]
        function.__signature__ = signature.replace(parameters=[*own, *keywords])  # type: ignore[attr-defined]
        if function.__doc__:  # not under python -OO
            line = re.compile(r"^( *)\*\*options: .*$", re.MULTILINE)
            function.__doc__ = line.sub(lambda found: textwrap.indent(described, found[1]), function.__doc__)
        return function

    return decorate
