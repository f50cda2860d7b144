"""Gradients that the step takes itself through the model: a pipeline's last stage has none for what lies before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbdist.errors import PlanError
from nbdist.plan import Mesh
from nbdist.upstream.torch_private import pytree

__all__ = ["StepGradients"]


class StepGradients:
    """Raises where the step itself runs a backward that reaches the stages before the last one.

    Args:
        mesh: The mesh, for the error.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._in_step = False

    @contextlib.contextmanager
    def refused(self, activations: list[torch.Tensor]) -> Iterator[None]:
        """Context for the step.

        Args:
            activations: What the last stage has received; without gradients in evaluation.
        """
        hooks = [tensor.register_hook(self._refuse) for tensor in activations if tensor.requires_grad]
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            for hook in hooks:
                hook.remove()

    def connect(self, call: tuple[Any, ...], outputs: Any) -> Any:
        """The model's outputs, with a graph to those arguments of its call that require grad. Local."""
        given = [
            value for value in pytree.tree_leaves(call)
            if isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)
        ]  # fmt: skip
        if not (given and torch.is_grad_enabled()):
            return outputs

        def connected(value: Any) -> Any:
            if not (isinstance(value, torch.Tensor) and value.requires_grad):
                return value
            return _Connected.apply(self._refuse, value, *given)  # type: ignore[no-untyped-call]

        return pytree.tree_map(connected, outputs)

    def _refuse(self, _gradient: Any = None) -> None:
        if self._in_step:
            raise PlanError(
                "the step takes a gradient through the model itself (by torch.autograd.grad or backward), whose first "
                f"layers are on another rank of mesh {self._mesh}: use the strategy data."
            )


class _Connected(torch.autograd.Function):
    """The identity of a tensor, with a graph to others, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, refuse: Any, value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.refuse, ctx.others = refuse, len(others)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.refuse()
        return None, gradients[0], *[None] * ctx.others
