"""Evaluates a word of a magic's line in the notebook: to a value, a path, a function."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.text import DollarFormatter

from nbdist.errors import PlanError, TaskError, suggest
from nbdist.plan.option import Option

__all__ = ["evaluate", "read_options", "read_word"]


def evaluate(shell: InteractiveShell, expression: str) -> Any:
    """The value of a name or expression in the notebook."""
    namespace = shell.user_ns
    try:
        return eval(expression, namespace)
    except NameError as error:
        name = getattr(error, "name", None) or expression
        raise TaskError(f"{name!r} is not defined in the notebook.{suggest(name, namespace)}") from None
    except SyntaxError:
        raise PlanError(f"{expression!r} is not a Python expression.") from None
    except Exception as error:
        raise TaskError(f"{expression} cannot be evaluated: {type(error).__name__}: {error}") from error


def read_options(shell: InteractiveShell, given: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    """The values of options on a magic's line, each read as its `Option.read` says."""
    return {name: read_word(shell, word, options[name].read, options[name].words) for name, word in given.items()}


def read_word(shell: InteractiveShell, word: Any, read: str, known: Collection[str] = ()) -> Any:
    """The value of a word on a magic's line, read as `Option.read` says; what is `known` stays as it is."""
    if read in ("text", "amount"):
        return word if word in known else _text(shell, word, int if read == "amount" else str)
    if read == "callable":
        return _callable(shell, word, known)
    readers = {"value": evaluate, "quotable": _quotable, "path": _path}
    return readers[read](shell, word)


def _text(shell: InteractiveShell, word: Any, more: type = str) -> Any:
    """The text that is the value of an expression, or the texts, where several may be given; else the word itself.

    Args:
        shell: The shell.
        word: Of the line; a list where there may be several.
        more: A type whose values are texts too.
    """
    (text,) = word if isinstance(word, list) and len(word) == 1 else (word,)
    if not isinstance(text, str):
        return word
    try:
        value = eval(text, shell.user_ns)
    except Exception:  # it is no expression, or has no value
        return word
    if isinstance(word, list) and isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
        return value
    return str(value) if isinstance(value, (str, more)) else None if value is None else word


def _path(shell: InteractiveShell, text: str | bool) -> str | bool:
    """A path, with ``{name}`` in it as in an f-string of the notebook; True stays True."""
    if isinstance(text, bool):
        return text
    words = text.strip("'\"")
    try:  # not `shell.var_expand`, which would expand this function's own names too
        return DollarFormatter().vformat(words, (), shell.user_ns)
    except Exception:  # as IPython does: it stays as it is
        return words


def _quotable(shell: InteractiveShell, text: str) -> Any:
    """The value of an expression, which may stand in quotes."""
    value = evaluate(shell, text)
    return evaluate(shell, value) if isinstance(value, str) else value


def _callable(shell: InteractiveShell, text: str, known: Collection[str]) -> Any:
    """The notebook's object of that name, or of an expression; else a well-known name, which a string may hold."""
    if not text.isidentifier():
        value = evaluate(shell, text)
        # In quotes, as an expression with blanks has to be; a string without any is a name.
        return value if not isinstance(value, str) or value.isidentifier() else evaluate(shell, value)
    if not known and text not in shell.user_ns:
        return evaluate(shell, text)
    value = shell.user_ns.get(text)
    if (
        callable(value)
        or isinstance(value, (Mapping, list, tuple))
        or hasattr(value, "param_groups")
        or hasattr(value, "compute")
    ):
        return value
    return text if text in known else _text(shell, text)
