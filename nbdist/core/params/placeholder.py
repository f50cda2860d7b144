"""Placeholders: parameters, or buffers, whose values are on another rank; only their metadata can be read."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from nbdist.errors import PlanError
from nbdist.upstream.torch_private import pytree

__all__ = ["Placeholders", "detached", "dummy", "is_placeholder", "reveal"]

_METADATA = {
    "__len__", "dim", "element_size", "empty_like", "full_like", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_same_size", "is_signed", "ndimension", "nelement", "new_empty", "new_empty_strided",
    "new_full", "new_ones", "new_zeros", "numel", "ones_like", "register_hook", "register_post_accumulate_grad_hook",
    "requires_grad_", "size", "storage_offset", "stride", "zeros_like",
}  # fmt: skip
"""Functions of torch that use a tensor's shape or dtype, but never its values."""
_VALUES = {"H", "T", "__cuda_array_interface__", "data", "imag", "mH", "mT", "real"}
"""Tensor attributes that give access to its values; all others are metadata."""


class Placeholders:
    """Intercepts operations on parameters: they temporarily get a subclass whose ``__torch_function__`` calls `read`.

    The objects stay the same, as torch's lazy parameters do when their ``__class__`` changes.

    Args:
        read: Called with the parameters of an operation, placeholders among them, and whether it accesses ``data``,
            through which it may write unnoticed. It either raises, or provides values and reveals the parameters. It
            must not raise a TypeError, such as TaskError: torch's operators turn it into "unsupported operand".
    """

    def __init__(self, read: Callable[[list[nn.Parameter], bool], None]) -> None:
        self._read = read
        self._kinds: dict[type, Any] = {}

    def hide(self, parameter: torch.Tensor) -> None:
        """Make a parameter or buffer a placeholder. Local."""
        own = type(parameter)
        if not issubclass(own, _Placeholder):
            if own not in self._kinds:
                body = {"own": own, "read": self._read}
                self._kinds[own] = types.new_class(
                    own.__name__, (_Placeholder, own), exec_body=lambda names: names.update(body)
                )
            parameter.__class__ = self._kinds[own]

    def reveal(self, parameter: nn.Parameter) -> bool:
        """Make a placeholder of this object an ordinary parameter again; returns whether it was one. Local."""
        mine = type(parameter) in self._kinds.values()
        if mine:
            reveal(parameter)
        return mine


class _Placeholder:
    __slots__ = ()
    own: ClassVar[Any]
    read: ClassVar[Any]

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if name in _METADATA or (name in ("__get__", "__set__", "__delete__") and attribute not in _VALUES):
            return super().__torch_function__(function, kinds, args, kwargs or {})  # type: ignore[misc]
        given: list[Any] = [
            value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, (nn.Parameter, _Placeholder))
        ]
        for read in {type(value).read for value in given if isinstance(value, _Placeholder)}:
            read(given, attribute == "data")
        if any(isinstance(value, _Placeholder) for value in given):
            raise PlanError("an operation uses a parameter whose values are not on this rank: create the model again.")
        return function(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"{self.own.__name__}(a placeholder, whose values are not on this rank)"


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a parameter is a placeholder now."""
    return isinstance(tensor, _Placeholder)


def reveal(parameter: torch.Tensor) -> None:
    """Make a placeholder an ordinary parameter again, without changing its data. Local."""
    if isinstance(parameter, _Placeholder):
        parameter.__class__ = parameter.own


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.detach()``, for placeholders too. Local."""
    if isinstance(tensor, _Placeholder):
        data: torch.Tensor = nn.Parameter.__torch_function__(torch.Tensor.detach, (), (tensor,), {})
        return data
    return tensor.detach()


def dummy(layout: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same shape without memory, for ranks that hold no part. Its values are NaN, to show misuse."""
    fill = float("nan") if layout.is_floating_point() or layout.is_complex() else 0
    return torch.full((), fill, dtype=layout.dtype, device=device).expand(layout.shape)
