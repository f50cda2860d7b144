"""Step guard: whether model and buffers still hold the state after the last complete step, after an error."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.state.first_values import SMALL_BYTES

__all__ = ["StepGuard"]


class StepGuard:
    """Marks when weights and buffers change, so that an error never leaves half an update in a snapshot.

    A failed forward has changed running statistics, so small buffers are copied after each step.

    Args:
        model: The trained model.

    Attributes:
        buffers: The values of the small buffers after the last complete step, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        all_buffers = dict(self._model.named_buffers())
        self._small = {name: buffer for name, buffer in all_buffers.items() if buffer.nbytes <= SMALL_BYTES}
        self._large = {name: buffer for name, buffer in all_buffers.items() if buffer.nbytes > SMALL_BYTES}
        self.buffers = {name: buffer.detach().clone() for name, buffer in self._small.items()}
        self._versions: list[int] = []
        self._complete = False
        self.end_step()

    @property
    def intact(self) -> bool:
        """Whether the model still holds the state after the last complete step; small buffers aside."""
        same = {name: id(buffer) for name, buffer in self._model.named_buffers()} == {
            name: id(buffer) for name, buffer in {**self._small, **self._large}.items()
        }
        return self._complete and same and self._versions == [b._version for b in self._large.values()]

    def begin_update(self) -> None:
        """The next step's update starts."""
        self._complete = False

    @torch.no_grad()
    def end_step(self) -> None:
        """A step is complete."""
        if self._small:
            torch._foreach_copy_(list(self.buffers.values()), list(self._small.values()))
        self._versions = [buffer._version for buffer in self._large.values()]
        self._complete = True
