"""Optimizers that compute the loss again within their step, such as LBFGS and SAM: their ``step`` needs a closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from nbdist.core.optim.shardability import steps_with_closure_only
from nbdist.errors import TaskError

__all__ = ["OptimizerSteps", "needs_closure", "step_alone"]

_OF_GRAPHS = ("grad_fn", "create_graph")
"""What an error says where an optimizer wants the graph of gradients: autograd's own, or the optimizer's advice."""


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer cannot step without a closure, by its signature, or on small tensors. Local."""
    return _requires_argument(optimizer) or steps_with_closure_only(optimizer)


def step_alone(optimizer: torch.optim.Optimizer) -> None:
    """Run one step without a closure. Local.

    Raises:
        TaskError: It differentiates gradients, which have no graph.
    """
    try:
        optimizer.step()
    except Exception as error:
        if not any(word in str(error) for word in _OF_GRAPHS):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise TaskError(
            f"the optimizer {type(optimizer).__name__} differentiates gradients a second time, and those in .grad are "
            f"means over ranks and slices, which have no graph ({what}): use one that needs gradients alone, such as "
            "AdamW."
        ) from error


class OptimizerSteps:
    """Steps optimizers: without a closure, as most are made for, or with one, if they fail otherwise."""

    def __init__(self) -> None:
        self._needing: dict[int, bool] = {}

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> None:
        """Run one step. **Collective** if it calls the closure, as it does on all ranks alike.

        Args:
            optimizer: Of all ranks the same, over equal parameters and gradients.
            closure: Computes the loss and the gradients again.

        Raises:
            TaskError: See `step_alone`.
        """
        needing = self._needing.get(id(optimizer))
        if needing is None:  # asked once: it takes longer than the step of a small model
            needing = self._needing[id(optimizer)] = _requires_argument(optimizer)
        if needing:
            optimizer.step(closure)
            return
        try:
            step_alone(optimizer)
        except Exception:
            if not steps_with_closure_only(optimizer):
                raise
            self._needing[id(optimizer)] = True
            optimizer.step(closure)


def _requires_argument(optimizer: torch.optim.Optimizer) -> bool:
    own = vars(optimizer).get("step")
    is_own = own is not None and not hasattr(own, "_wrapped_by_lr_sched")  # a scheduler's wrapper looks as if unbound
    try:
        step: Any = own if is_own else type(optimizer).step
        parameters = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        return False
    parameters = parameters if is_own else parameters[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is p.empty for p in parameters)
