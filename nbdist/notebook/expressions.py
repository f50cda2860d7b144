"""Evaluates a word of a magic's line in the notebook: to a value, a path, a function."""

from __future__ import annotations

from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from nbdist.errors import PlanError, TaskError, suggest

__all__ = ["callable_of", "evaluate", "path_of", "value_of"]


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


def value_of(shell: InteractiveShell, text: str | None) -> Any:
    """The value of an expression, which may stand in quotes; None stays None."""
    value = None if text is None else evaluate(shell, text)
    return evaluate(shell, value) if isinstance(value, str) else value


def path_of(shell: InteractiveShell, text: str | bool) -> str | bool:
    """A path, with ``{name}`` in it as in an f-string of the notebook; True stays True."""
    return text if isinstance(text, bool) else str(shell.var_expand(text.strip("'\""), depth=1))


def callable_of(shell: InteractiveShell, text: str | None) -> Any:
    """The value of --loss, --optimizer or --metric: the notebook's object, else a well-known name."""
    if text is None:
        return None
    if text.isidentifier():
        value = shell.user_ns.get(text)
        return value if callable(value) or hasattr(value, "param_groups") else text
    return evaluate(shell, text)
