"""Mixed precision: autocast, and for fp16 dynamic loss scaling (cf. torch.amp.GradScaler)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["Precision"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE = 2.0**16
_LEAST_SCALE = 2.0**-24  # with this scale no gradient of a finite loss overflows
_GROWTH_STEPS = 2000


class Precision:
    """Autocast, and for fp16 the dynamic loss scale (Micikevicius et al., 2018).

    Args:
        name: "full", "bf16" or "fp16".
        device: Where forward runs.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype = _DTYPES.get(name)
        self._device = device
        self.scale = _FIRST_SCALE if name == "fp16" else 1.0
        self._steps = 0

    @property
    def full(self) -> bool:
        """Whether autocast is off: everything computes in its own dtype."""
        return self._dtype is None

    @property
    def eps(self) -> float:
        """The relative rounding of what autocast computes; 0 if it is off."""
        return 0.0 if self._dtype is None else torch.finfo(self._dtype).eps

    @property
    def scales(self) -> bool:
        """Whether losses are scaled, so that gradients have to be unscaled."""
        return self._dtype is torch.float16

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context for forward and loss."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def adapt(self, finite: bool) -> None:
        """Update the scale after a step: halve it after an overflow, double it after 2000 steps without one."""
        self._steps = self._steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, _LEAST_SCALE)
        elif self._steps % _GROWTH_STEPS == 0:
            self.scale *= 2

    def state_dict(self) -> list[float]:
        """The scale, and the steps since the last overflow, as JSON-able data."""
        return [self.scale, self._steps]

    def load_state_dict(self, state_dict: list[float]) -> None:
        """Load a `state_dict`; ignored if losses are not scaled."""
        if self.scales:
            self.scale, self._steps = state_dict[0], int(state_dict[1])
