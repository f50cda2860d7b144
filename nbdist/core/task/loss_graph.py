"""The graph of a loss where no gradients are wanted: in evaluation, which runs as it would without."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nbdist.core.task.loss_weight import is_constant

__all__ = ["LossGraph"]


class LossGraph(TorchFunctionMode):
    """Records the graph of scalars beside what is computed, which it leaves alone.

    Each function that gives a scalar is called once more, on the side and with gradients; no memory is kept for a
    backward. What is no scalar is where the graph begins, but for what is made of parameters alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the id of the first, which so stays its own

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its graph; itself where none was recorded."""
        return self._twins.get(id(tensor), (tensor, tensor))[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`."""
        kwargs = kwargs or {}
        place = args[0] if args and isinstance(args[0], torch.Tensor) else None
        version = None if place is None or place.is_inference() else place._version
        result = func(*args, **kwargs)
        if torch.is_grad_enabled() or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        given = [t for value in (*args, *kwargs.values()) for t in _tensors(value)]
        if not given:  # a number that was drawn, say: called once more it would be another, and so would the next ones
            return result
        if result is place:
            if version == place._version or id(place) not in self._twins:
                return result
        elif id(result) in self._twins or any(result is tensor for tensor in given):
            return result
        if result.ndim == 0 or self._worth(result, given):
            self._record(result, func, args, kwargs, given[0] if given else None)
        return result

    def _worth(self, result: torch.Tensor, given: list[torch.Tensor]) -> bool:
        """Whether something that is no scalar is made of a few scalars, or of parameters alone."""
        twins = [tensor for tensor in given if id(tensor) in self._twins]
        if len(twins) == len(given) >= result.numel():
            return True
        return bool(given) and all(isinstance(t, nn.Parameter) or is_constant(self.of(t).grad_fn) for t in given)

    def _record(self, result: torch.Tensor, func: Any, args: Any, kwargs: Any, first: torch.Tensor | None) -> None:
        def graphed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                begins = value is first and value.is_floating_point() and value.ndim > 0
                known = id(value) in self._twins or isinstance(value, nn.Parameter)
                return value.detach().requires_grad_() if begins and not known else self.of(value)
            return type(value)(map(graphed, value)) if type(value) in (list, tuple) else value

        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_outline, _same):
                twin = func(*map(graphed, args), **{key: graphed(value) for key, value in kwargs.items()})
        except Exception:  # what has no gradient has no graph, and the value is there already
            self._twins.pop(id(result), None)
            return
        self._twins[id(result)] = result, twin


def _tensors(value: Any) -> list[torch.Tensor]:
    inner = value if type(value) in (list, tuple) else (value,)
    return [tensor for tensor in inner if isinstance(tensor, torch.Tensor)]


def _outline(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() <= 1 or tensor.dtype is torch.int64:  # divisors and labels
        return tensor if tensor.grad_fn is None else tensor.detach()
    return torch.empty_like(tensor, device="meta")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
