"""A running weighted mean of losses or metrics, accumulated on their device without synchronizing it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RunningMean"]


class RunningMean:
    """Adds up ``value * weight`` and ``weight`` in float64. A GPU is not waited for until the `value` is read.

    Args:
        device: The device of the values.
        initial: Initial `sums`, as numbers.
    """

    def __init__(self, device: torch.device, initial: tuple[float, float] = (0.0, 0.0)) -> None:
        self._device = device
        # A number on the CPU, where reading a value costs less than an operation on it; else a tensor after `add`.
        self._sum: Any
        self._sum, self._weight = initial

    def add(self, value: Any, weight: Any) -> None:
        """Add a mean over `weight`; with weight zero nothing is added, even if the value is NaN.

        Args:
            value: A scalar tensor or a number.
            weight: A number or a scalar tensor.
        """
        if self._device.type == "cpu":
            value, weight = float(value), float(weight)
            self._sum += value * weight if weight else 0.0
        elif isinstance(weight, torch.Tensor):
            self._sum = self._sum + torch.where(weight == 0, 0.0, value * weight.double())
        elif weight and isinstance(self._sum, torch.Tensor) and isinstance(value, torch.Tensor):
            self._sum = torch.add(self._sum, value, alpha=weight)  # a single operation, in float64
        elif weight:
            self._sum = self._sum + torch.as_tensor(value, device=self._device).double() * weight
        self._weight = self._weight + weight

    def add_sums(self, total: Any, weight: Any) -> None:
        """Add the `parts` of another mean, on the same device."""
        self._sum, self._weight = self._sum + total, self._weight + weight

    @property
    def parts(self) -> tuple[Any, Any]:
        """The weighted sum and the weight, as they are: numbers or scalar tensors."""
        return self._sum, self._weight

    @property
    def sums(self) -> torch.Tensor:
        """``(2,)`` in float64 on the device: the weighted sum and the weight. Sums of several ranks may be added."""
        pair = [torch.as_tensor(x, dtype=torch.float64, device=self._device) for x in (self._sum, self._weight)]
        return torch.stack(pair)

    @property
    def value(self) -> float | None:
        """The mean; None if the weight is zero. Waits for the device."""
        total, weight = self.sums.tolist()
        return total / weight if weight else None
