"""What each_epoch assigns and the ranks would never see: it is called on one rank, or in the notebook."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nbdist.core.task.own_loop import function_of, names_read
from nbdist.errors import TaskError

__all__ = ["changed_rates", "check_each_epoch", "settings_of"]

_WHERE = "it is called on one rank, or in the notebook, so the other ranks would not see it"
_CURE = "compute it in the step, from nbdist.current_step(), or in after_step (--after-step), which every rank calls"


def check_each_epoch(
    name: str, each_epoch: Any, readers: Mapping[str, Any], model: nn.Module, of: str, *, in_file: bool
) -> None:
    """Check that it can be called, and assigns nothing that the training reads, as far as its own code says. Local.

    Args:
        name: Of the function.
        each_epoch: The function.
        readers: What the training calls, by what the user calls it: the step, the loss, `after_step`.
        model: The model, whose forward reads too.
        of: The user's name for it.
        in_file: Whether it lies in a file.

    Raises:
        TaskError: It cannot, or it does.
    """
    if in_file:
        raise TaskError(
            f"each_epoch={name} gets the whole model in memory, and {of} lies in a file, as one that is too large for "
            "it: leave each_epoch out."
        )
    function = function_of(each_epoch)
    tree = None if function is None else _tree(function)
    if function is None or tree is None:
        return
    first = next(iter(inspect.signature(function).parameters), "")
    shared = {given for part in ast.walk(tree) if isinstance(part, (ast.Global, ast.Nonlocal)) for given in part.names}
    for target in _targets(tree):
        root = _root(target)
        if isinstance(target, ast.Name):
            if root not in shared:
                continue
        elif root == first:
            raise TaskError(f"each_epoch={name} assigns {ast.unparse(target)}: {_WHERE}: {_CURE}.")
        reader = next((of for of, one in readers.items() if root in names_read(one)), "")
        if not reader and any(root in names_read(type(module).forward) for module in model.modules()):
            reader = "the model"
        if reader:
            raise TaskError(
                f"each_epoch={name} assigns {ast.unparse(target)}, which {reader} reads: {_WHERE}: {_CURE}."
            )


def settings_of(optimizers: Mapping[str, torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """A copy of the settings of all parameter groups. Local."""
    groups = (group for optimizer in optimizers.values() for group in optimizer.param_groups)
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def changed_rates(name: str, before: list[dict[str, Any]], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Raise `TaskError` if each_epoch has changed a setting of an optimizer. Local."""
    for was, has in zip(before, settings_of(optimizers), strict=False):
        for key, value in has.items():
            if isinstance(value, (int, float)) and was.get(key) != value:
                raise TaskError(
                    f"each_epoch={name} sets {key} of an optimizer to {value}: {_WHERE}: give lr_scheduler "
                    "(--lr-scheduler, --schedule-by epoch)."
                )


def _tree(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no file, or a lambda in the midst of a line
        return None


def _targets(tree: ast.AST) -> Iterator[ast.expr]:
    """Names, attributes and items that a function assigns."""
    for part in ast.walk(tree):
        if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(part.ctx, ast.Store):
            yield part


def _root(target: Any) -> str:
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        target = target.value
    return target.id if isinstance(target, ast.Name) else ""
