"""Placeholders: parameters whose values lie elsewhere. They tell their shape; nobody computes with them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nbdist.errors import PlanError

__all__ = ["Placeholders", "detached", "dummy", "is_placeholder", "reveal"]

_METADATA = {
    "__len__", "dim", "element_size", "empty_like", "full_like", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "is_same_size", "is_signed", "ndimension", "nelement", "new_empty", "new_empty_strided",
    "new_full", "new_ones", "new_zeros", "numel", "ones_like", "register_hook", "register_post_accumulate_grad_hook",
    "requires_grad_", "size", "storage_offset", "stride", "zeros_like",
}  # fmt: skip
"""What of torch's functions looks at a tensor's shape and never at its values."""
_VALUES = {"H", "T", "__cuda_array_interface__", "data", "imag", "mH", "mT", "real"}
"""Of a tensor's attributes those that give its values away; all others tell about it."""


class Placeholders:
    """Keeps arithmetic away from parameters, by lending them a class whose every operation comes by here first.

    The objects stay the same, as those of torch's own lazy parameters do when they change their class.

    Args:
        read: Called with the parameters that something is about to compute with, hidden ones among them, and whether
            it takes their ``data``, to which it may write unseen. It either raises, or gives them values and reveals
            them. No TypeError, as TaskError is one: torch's operators would turn it into "unsupported operand".
    """

    def __init__(self, read: Callable[[list[nn.Parameter], bool], None]) -> None:
        self._read = read
        self._kinds: dict[type, Any] = {}

    def hide(self, parameter: nn.Parameter) -> None:
        """From now on `parameter` is a placeholder. Local."""
        own = type(parameter)
        if not issubclass(own, _Placeholder):
            if own not in self._kinds:
                body = {"own": own, "read": self._read}
                self._kinds[own] = types.new_class(
                    own.__name__, (_Placeholder, own), exec_body=lambda names: names.update(body)
                )
            parameter.__class__ = self._kinds[own]

    def reveal(self, parameter: nn.Parameter) -> bool:
        """Let it be an ordinary one if it is a placeholder of these, and tell whether it was. Local."""
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
        given: list[Any] = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, nn.Parameter)]
        for read in {type(value).read for value in given if isinstance(value, _Placeholder)}:
            read(given, attribute == "data")
        if any(isinstance(value, _Placeholder) for value in given):
            raise PlanError("a parameter is computed with whose values are not here: train the model, or make it anew.")
        return function(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"{self.own.__name__}(a placeholder, whose values are not here)"


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a parameter is one now."""
    return isinstance(tensor, _Placeholder)


def reveal(parameter: nn.Parameter) -> None:
    """Let a parameter be an ordinary one, whatever its values are by now. Local."""
    if isinstance(parameter, _Placeholder):
        parameter.__class__ = parameter.own


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.detach()``, of a placeholder too. Local."""
    if isinstance(tensor, _Placeholder):
        told: torch.Tensor = nn.Parameter.__torch_function__(torch.Tensor.detach, (), (tensor,), {})
        return told
    return tensor.detach()


def dummy(layout: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a parameter holds where its values are not: its shape without memory. Read by mistake, it shows as NaN."""
    fill = float("nan") if layout.is_floating_point() or layout.is_complex() else 0
    return torch.full((), fill, dtype=layout.dtype, device=device).expand(layout.shape)
