"""The boundary between two steps, to which a training can come back after an error."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.state.shard_plan import SMALL_BYTES

__all__ = ["StepGuard"]


class StepGuard:
    """The state between two steps: whether weights and buffers are what they were after the last one.

    A forward that fails has changed running statistics, so their values at the boundary are kept beside them.

    Args:
        model: What is trained.

    Attributes:
        buffers: The values of the small buffers at the boundary, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        all_buffers = dict(self._model.named_buffers())
        self._small = {name: buffer for name, buffer in all_buffers.items() if buffer.nbytes <= SMALL_BYTES}
        self._large = {name: buffer for name, buffer in all_buffers.items() if buffer.nbytes > SMALL_BYTES}
        self.buffers = {name: buffer.detach().clone() for name, buffer in self._small.items()}
        self._versions: list[int] = []
        self._complete = False
        self.reach()

    @property
    def intact(self) -> bool:
        """Whether the state of the last complete step is still here."""
        same = {name: id(buffer) for name, buffer in self._model.named_buffers()} == {
            name: id(buffer) for name, buffer in {**self._small, **self._large}.items()
        }
        return self._complete and same and self._versions == [b._version for b in self._large.values()]

    def leave(self) -> None:
        """The next step's update begins."""
        self._complete = False

    @torch.no_grad()
    def reach(self) -> None:
        """A step is complete."""
        if self._small:
            torch._foreach_copy_(list(self.buffers.values()), list(self._small.values()))
        self._versions = [buffer._version for buffer in self._large.values()]
        self._complete = True
