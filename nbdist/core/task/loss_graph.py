"""The autograd graph of a loss under `no_grad` (in evaluation), recorded beside the computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nbdist.core.task.loss_weight import is_constant

__all__ = ["LossGraph"]


class LossGraph(TorchFunctionMode):
    """Records a graph for scalars, and leaves the computation itself as it is.

    Each function that returns a scalar is called a second time, with gradients enabled, and saves no tensors for
    backward. The graph's leaves are the non-scalar inputs, except for tensors computed from parameters alone.
    """

    active: LossGraph | None = None
    """The one that records now."""

    def __init__(self) -> None:
        super().__init__()
        self._before: LossGraph | None = None
        # By id of the tensor, which the entry keeps alive, so that the id is not reused.
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> Any:
        """Begin to record."""
        self._before, LossGraph.active = LossGraph.active, self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        """End."""
        LossGraph.active = self._before
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's twin with a graph; the tensor itself if none was recorded."""
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
        if not given:  # a random number, say: a second call would advance the generator
            return result
        if result is place:
            if version == place._version or id(place) not in self._twins:
                return result
        elif id(result) in self._twins or any(result is tensor for tensor in given):
            return result
        if result.ndim == 0 or self._is_recorded(result, given):
            self._record(result, func, args, kwargs, given[0] if given else None)
        return result

    def _is_recorded(self, result: torch.Tensor, given: list[torch.Tensor]) -> bool:
        """Whether a non-scalar is computed from recorded scalars only, or from parameters only."""
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
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_without_values, _same):
                twin = func(*map(graphed, args), **{key: graphed(value) for key, value in kwargs.items()})
        except Exception:  # it has no gradient, so no graph; the value itself is already computed
            self._twins.pop(id(result), None)
            return
        self._twins[id(result)] = result, twin


def _tensors(value: Any) -> list[torch.Tensor]:
    inner = value if type(value) in (list, tuple) else (value,)
    return [tensor for tensor in inner if isinstance(tensor, torch.Tensor)]


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """What a node saves: divisors and labels, which `mean_over` reads, and of other tensors the shape only."""
    if tensor.numel() <= 1 or tensor.dtype is torch.int64:
        return tensor if tensor.grad_fn is None else tensor.detach()
    return torch.empty_like(tensor, device="meta")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
