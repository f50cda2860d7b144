"""Evaluates a word of a magic's line in the notebook: to a value, a path, a function."""

from __future__ import annotations

from collections.abc import Mapping
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
    return {name: read_word(shell, word, options[name].read) for name, word in given.items()}


def read_word(shell: InteractiveShell, word: Any, read: str) -> Any:
    """The value of a word on a magic's line, read as `Option.read` says."""
    readers = {
        "text": lambda shell, word: word, "callable": _callable, "value": evaluate, "quotable": _quotable,
        "path": _path,
    }  # fmt: skip
    return readers[read](shell, word)


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


def _callable(shell: InteractiveShell, text: str) -> Any:
    """The notebook's object of that name, or of an expression; else a well-known name."""
    if text.isidentifier():
        value = shell.user_ns.get(text)
        known = callable(value) or hasattr(value, "param_groups") or hasattr(value, "compute")
        return value if known else text
    return evaluate(shell, text)
