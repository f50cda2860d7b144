"""Precision: what forward computes in, and how gradients in half precision are kept from vanishing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["Precision"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE = 2.0**16
_LEAST_SCALE = 2.0**-24  # below it no gradient of a finite loss overflows
_GROWTH_STEPS = 2000


class Precision:
    """Autocast, and for fp16 the dynamic scale of the loss (Micikevicius et al., 2018).

    Args:
        word: "full", "bf16" or "fp16".
        device: Where forward runs.
    """

    def __init__(self, word: str, device: torch.device) -> None:
        self._dtype = _DTYPES.get(word)
        self._device = device
        self.scale = _FIRST_SCALE if word == "fp16" else 1.0
        self._steps = 0

    @property
    def full(self) -> bool:
        """Whether everything computes in the dtypes that it has."""
        return self._dtype is None

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, so that gradients have to be unscaled."""
        return self._dtype is torch.float16

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around forward and loss."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def adapt(self, finite: bool) -> None:
        """Learn from a step: halve the scale after an overflow, double it after many steps without one."""
        self._steps = self._steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, _LEAST_SCALE)
        elif self._steps % _GROWTH_STEPS == 0:
            self.scale *= 2

    def state_dict(self) -> list[float]:
        """Where the scale stands, as JSON-able data."""
        return [self.scale, self._steps]

    def load_state_dict(self, state_dict: list[float]) -> None:
        """Go on from where `state_dict` says, where losses are scaled."""
        if self.scales:
            self.scale, self._steps = state_dict[0], int(state_dict[1])
