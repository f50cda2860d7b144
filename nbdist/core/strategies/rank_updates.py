"""The updates within a step on one rank of data parallelism: gradients of one optimizer at a time are synchronized."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nbdist.core.data.reader import Slice
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.step_tail import StepLosses
from nbdist.core.task.step_updates import StepUpdates
from nbdist.errors import TaskError

if TYPE_CHECKING:
    from nbdist.core.strategies.strategy import Strategy

__all__ = ["RankUpdates"]

_ENDS = ""
"""In place of an optimizer's name: the rank's step ends."""


class RankUpdates(StepUpdates):
    """Runs the step of a task that calls `nbdist.update`, on ranks that compute one slice of each batch.

    Args:
        strategy: Its reducer has no parameters, and carries the tail of the step.
        reducer_of: Makes the reducer of some parameters' gradients.
    """

    def __init__(self, strategy: Strategy, reducer_of: Callable[[list[nn.Parameter]], GradientReducer]) -> None:
        super().__init__(strategy.task)
        self._strategy = strategy
        self._reducers = {name: reducer_of(own) for name, own in self.parameters.items()}
        self._held: dict[torch.Tensor, torch.Tensor] | None = None
        self._step = 0

    def run(self, step: int, part: Slice) -> StepLosses:
        """Run the step on this rank's slice. **Collective** over the data axis.

        Returns:
            The sum of the slice's losses.

        Raises:
            TaskError: See `nbdist.update`.
        """
        strategy = self._strategy
        self._step = step
        if self._held is not None:
            self._held.clear()
        strategy.batch_gather.begin(counts=part.samples > 0)
        loss, weight = strategy.compute(part, ("slice", step), self.loss_and_weight)
        self._agree(_ENDS)
        if part.samples:
            strategy.reducer.losses.add(part.index, loss, weight, strategy.units(weight, part, first=False))
        if self._held is not None:
            for parameter in (parameter for own in self.parameters.values() for parameter in own):
                parameter.grad = self._held.get(parameter)
        return strategy.reducer.losses

    def apply(self, name: str, loss: torch.Tensor, weight: Any, retain_graph: bool) -> None:
        """See `StepUpdates`."""
        self._agree(name)
        strategy, reducer, parameters = self._strategy, self._reducers[name], self.parameters[name]
        reducer.begin()
        scaled, unwanted = strategy.weigh(self.part, loss, weight, reducer.losses, first=self.calls == 1)
        if strategy.plan.stop_on_nan:
            reducer.losses.check_finite(self._step + 1)
        reducer.expect_last()
        if scaled is not None and not unwanted:
            torch.autograd.backward(scaled, inputs=parameters, retain_graph=retain_graph)
        reducer.add_slice(self.part.index)
        totals = reducer.finish()
        if self._held is None:
            if reducer.losses.any_known or totals.weight:  # any rank had data
                strategy.update_by(name)
        else:
            for parameter in parameters:
                if parameter.grad is not None:
                    self._held[parameter] = parameter.grad + self._held.get(parameter, 0)
        for parameter in parameters:  # another optimizer's hooks and clipping are to see its own alone
            parameter.grad = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Context of steps that update nothing: at their end parameters have the sums of their gradients. Local."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def close(self) -> None:
        """Release the parameters. Local."""
        for reducer in self._reducers.values():
            reducer.close()

    def _agree(self, name: str) -> None:
        """Check that all ranks do the same next. **Collective** over the data axis; waits for a GPU."""
        channel = self._strategy.axes.data
        if channel.size == 1:
            return
        code = zlib.crc32(name.encode())
        with channel.used_for("nbdist.update"):
            codes = [int(one) for one in channel.all_gather(torch.tensor([code], device=channel.device))]
        if len(set(codes)) > 1:
            here = f"nbdist.update for {name}" if name else "the end of the step"
            raise TaskError(
                f"ranks call nbdist.update for other optimizers, or not equally often (rank {channel.rank} is at "
                f"{here}): let each slice call the same ones in the same order, whatever its samples are."
            )
