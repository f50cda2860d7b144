"""What the training loop asks of a strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nbdist.core.channels import Channel
from nbdist.core.gradient_sync import Totals
from nbdist.core.params import ParamTable

__all__ = ["Strategy"]


class Strategy(ABC):
    """A module and a plan, turned into something with backward, sync and state.

    Args:
        table: The model's parameters and buffers.
        data_axis: The channel over the ranks that share the data.
    """

    def __init__(self, table: ParamTable, data_axis: Channel) -> None:
        self.table = table
        self.data_axis = data_axis

    @abstractmethod
    def begin_step(self) -> None:
        """Forget the gradients of the step before. Local."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, weight: Any, *, last: bool) -> None:
        """Add a slice's gradients, times its weight. Local; `last` says that no other slice follows in this step."""

    @abstractmethod
    def sync(self, weight: Any, *, stop: bool, exhausted: bool) -> Totals:
        """Make every gradient the weighted mean over all ranks. **Collective**; see `GradientSync.finish`."""

    @abstractmethod
    def share_buffers(self) -> None:
        """Make buffers such as running statistics the same on every rank. **Collective**."""

    @abstractmethod
    def close(self) -> None:
        """Leave the module as an ordinary one. Local."""
