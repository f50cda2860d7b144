"""Options as argparse arguments, for the magics and the command line."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from nbdist.errors import NbdistError, PlanError, suggest
from nbdist.plan.option import Option, explained, flag
from nbdist.plan.option_values import as_int

__all__ = ["OptionParser", "add_options", "given_options", "line_help", "split_line"]

_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class _Expression:
    """A word where an option takes a number or a yes, and which is none: the notebook may have its value."""

    text: str
    option: str
    kind: Any

    def value(self, evaluate: Callable[[str], Any]) -> Any:
        """Its value, as the option's type."""
        convert, what = _CONVERSIONS[self.kind]
        try:
            value = evaluate(self.text)
        except NbdistError as error:
            if self.kind is _yes_or_no and self.text.isidentifier():  # more likely a word than a name
                raise PlanError(f"{self.option} {self.text} is {what}.") from None
            raise type(error)(f"{self.option}: {error}") from error
        if value is None:  # as good as not given
            return None
        try:
            return convert(value)
        except Exception:  # of whatever kind of value
            found = "" if repr(value) == self.text else f"{value!r}, "
            raise PlanError(f"{self.option} {self.text} is {found}{what}.") from None


class OptionParser(argparse.ArgumentParser):
    """An argument parser that raises `PlanError`, for magics and the command line alike.

    Args:
        prog: The word that begins the line.
        description: For the help text.
        usage: For the help text; by argparse if it is None.
        expressions: Whether numbers may be written as expressions, whose values `parse` then asks for.
    """

    def __init__(self, prog: str, description: str, usage: str | None = None, *, expressions: bool = False) -> None:
        super().__init__(
            prog=prog, usage=usage, description=description, add_help=False, allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
        )  # fmt: skip
        self.elsewhere: dict[str, tuple[str, ...]] = {}
        """Each option's names in other trainers."""
        self._expressions = expressions

    @property
    def arguments(self) -> list[argparse.Action]:
        """Its arguments, in order."""
        return list(self._actions)

    def error(self, message: str) -> NoReturn:
        """Raise `PlanError` instead of ending the process."""
        raise PlanError(f"{self.prog}: {message}.")

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """See `argparse.ArgumentParser.add_argument`."""
        kind: Any = settings.get("type")
        if self._expressions and kind in _CONVERSIONS:
            settings["type"] = functools.partial(_literal_or_expression, names[-1], kind)
        return super().add_argument(*names, **settings)

    def parse(self, words: list[str], evaluate: Callable[[str], Any] | None = None) -> argparse.Namespace:
        """Parse `words`; the error for an unknown option suggests the nearest known one.

        Args:
            words: Of the line.
            evaluate: Returns the value of an expression; needed with `expressions`.
        """
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [flag for action in self.arguments for flag in action.option_strings]
            meant = [flag(option) for option, others in self.elsewhere.items() if name in map(flag, others)]
            raise PlanError(f"{self.prog}: unknown argument {name!r}.{suggest(name, known, meant)}")
        for name, value in vars(namespace).items():
            if isinstance(value, _Expression) and evaluate is not None:
                setattr(namespace, name, value.value(evaluate))
        return namespace


def _yes_or_no(word: str) -> bool:
    if word.lower() in ("yes", "true", "1"):
        return True
    if word.lower() in ("no", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither yes nor no")


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _bool(value: Any) -> bool:
    if value not in (True, False):
        raise ValueError
    return bool(value)


_CONVERSIONS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (as_int, "not a whole number"),
    float: (_float, "not a number"),
    _yes_or_no: (_bool, "neither yes nor no"),
}
"""For what a word is parsed by: how a value becomes the same, and what it is if it cannot."""


def _literal_or_expression(option: str, kind: Callable[[str], Any], word: str) -> Any:
    try:
        return kind(word)
    except (ValueError, argparse.ArgumentTypeError):
        return _Expression(word, option, kind)


def line_help(option: Option) -> str:
    """An option's help where it is a word on a line."""
    return explained(option, flag, {"True": "yes", "False": "no"})


def add_options(parser: OptionParser, options: Mapping[str, Option]) -> None:
    """Add options to `parser`, each with its sentence, unit and default."""
    parser.elsewhere |= {name: option.elsewhere for name, option in options.items()}
    for name, option in options.items():
        parse: Any = _yes_or_no if option.parse is bool else option.parse
        many: Any = {"nargs": "+"} if option.many else {"nargs": "?", "const": True} if option.bare else {}
        metavar = "yes|no" if option.parse is bool else option.metavar
        parser.add_argument(flag(name), type=parse, metavar=metavar, help=line_help(option).replace("%", "%%"), **many)


def given_options(namespace: argparse.Namespace, options: Mapping[str, Option]) -> dict[str, Any]:
    """The options in a parsed `namespace` that are not None."""
    given = vars(namespace)
    return {name: given[name] for name in options if given.get(name) is not None}


def split_line(line: str) -> list[str]:
    """Split a magic's line into words, keeping bracketed expressions and quoted strings whole.

    ``model (X, y) --loss mse`` gives ``["model", "(X, y)", "--loss", "mse"]``. Quotes stay, as in Python source.

    Raises:
        PlanError: A bracket or a quote is not closed.
    """
    words: list[str] = []
    word, closing, quote = "", [], ""
    for character in line:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character.isspace() and not closing:
            if word:
                words.append(word)
            word = ""
            continue
        word += character
    if quote or closing:
        raise PlanError(f"{(quote or closing[-1])!r} is missing in: {line.strip()}")
    return [*words, word] if word else words
