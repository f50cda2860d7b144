"""What the training loop asks of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nbdist.core.channels import Channel
from nbdist.core.eager import eager
from nbdist.core.gradient_sync import Totals
from nbdist.core.params import ParamTable

__all__ = ["Strategy"]


class Strategy(ABC):
    """A module and a plan, turned into something with backward, sync and state.

    Args:
        table: The model's parameters and buffers.
        data_axis: The channel over the ranks that share the data.
        full_batch: The usual weight of a global batch, in units of which slices are weighed.
    """

    def __init__(self, table: ParamTable, data_axis: Channel, full_batch: float) -> None:
        self.table = table
        self.data_axis = data_axis
        self._full_batch = full_batch

    @abstractmethod
    def begin_step(self) -> None:
        """Forget the gradients of the step before. **Collective**."""

    def backward(self, loss: torch.Tensor, weight: Any, *, last: bool) -> None:
        """Add a slice's gradients, times its weight. Local; `last` says that no other slice follows in this step."""
        # In float64, for a count divided by a number would be rounded to float32.
        share = (weight.double() if isinstance(weight, torch.Tensor) else weight) / self._full_batch
        # Not `backward(share)`: given a gradient, torch loads its symbolic shapes, and sympy with them.
        (loss if isinstance(share, float) and share == 1.0 else loss * share).backward()

    @abstractmethod
    def sync(self, weight: Any, *, stop: bool, exhausted: bool) -> Totals:
        """Make every gradient the weighted mean over all ranks. **Collective**; see `GradientSync.finish`."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters from their gradients. Local."""
        with eager():
            optimizer.step()

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Make buffers such as running statistics the same on every rank: their mean. **Collective**."""
        self.table.average_buffers_(self.data_axis)

    @abstractmethod
    def close(self) -> None:
        """Leave the module as an ordinary one. Local."""
