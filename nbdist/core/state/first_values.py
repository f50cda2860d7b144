"""Whether buffers and frozen parameters still have their first values, which a training step seldom changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from nbdist.core.params.param_table import ParamTable

__all__ = ["SMALL_BYTES", "FirstValues", "sampled"]

SMALL_BYTES = 1 << 16
"""Buffers up to this size count as changed in every step: BatchNorm writes its own without a new `_version`."""

_SAMPLED_VALUES = 16
"""How many values of a frozen parameter are compared to detect a change."""


class FirstValues:
    """Remembers what this rank has before the first step. Local.

    Args:
        model: Its buffers are looked up each time, since a forward may replace them.
        table: The model's tensors.
        parameters: Those to look at, of which the frozen ones count.
        changed: Buffers and frozen parameters that have changed before.
    """

    def __init__(
        self, model: nn.Module, table: ParamTable, parameters: Sequence[str], changed: Collection[str]
    ) -> None:  # fmt: skip
        self._model = model
        buffers = dict(model.named_buffers())
        self._frozen = {name: table.parameters[name] for name in parameters if not table.parameters[name].requires_grad}
        self._known = not any(name in changed for name in (*buffers, *self._frozen))
        self._small = {name: b.detach().clone() for name, b in buffers.items() if b.nbytes <= SMALL_BYTES}
        self._large = {name: (id(b), b._version) for name, b in buffers.items() if b.nbytes > SMALL_BYTES}
        self._fingerprints = self._taken()

    def unchanged(self) -> bool:
        """Whether all of it has its first values. Waits for a GPU."""
        buffers = dict(self._model.named_buffers())
        if not self._known or buffers.keys() != {*self._small, *self._large}:
            return False
        large = {name: (id(buffers[name]), buffers[name]._version) for name in self._large}
        small = all(_same(buffers[name], value) for name, value in self._small.items())
        return large == self._large and small and self._taken() == self._fingerprints

    def _taken(self) -> list[bytes | int]:
        parameters = [parameter.detach() for parameter in self._frozen.values()]
        return [*(parameter._version for parameter in parameters), *sampled(parameters)]


def sampled(parameters: Sequence[torch.Tensor]) -> list[bytes]:
    """Some values of each, the same ones each time. Waits for a GPU."""
    taken = []
    for device in {parameter.device for parameter in parameters}:
        samples = [
            parameter.reshape(-1)[:: -(-parameter.numel() // _SAMPLED_VALUES) or 1].contiguous().view(torch.uint8)
            for parameter in parameters
            if parameter.device == device
        ]
        taken.append(torch.cat(samples).cpu().numpy().tobytes())
    return taken


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same values."""
    if (tensor.shape, tensor.dtype, tensor.device) != (other.shape, other.dtype, other.device):
        return False
    return bool(((tensor == other) | (tensor.isnan() & other.isnan())).all())
