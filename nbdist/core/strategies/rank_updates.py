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
from nbdist.core.sync.step_tail import StepLosses, Totals
from nbdist.core.task.step_updates import StepUpdates
from nbdist.errors import TaskError

if TYPE_CHECKING:
    from nbdist.core.strategies.mesh_parallel import MeshParallel
    from nbdist.core.strategies.strategy import Strategy

__all__ = ["RankUpdates", "ShardUpdates"]


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
        self._agree(None)
        if part.samples:
            strategy.reducer.losses.add(part.index, loss, weight, strategy.units(weight, part, first=False))
        return strategy.reducer.losses

    def apply(self, name: str, loss: torch.Tensor, weight: Any, retain_graph: bool) -> None:
        """See `StepUpdates`."""
        self._agree(name)
        parameters = self.parameters[name]
        with self._gradients(name, loss, weight, retain_graph) as (losses, totals):
            if self._held is not None:
                for parameter in parameters:
                    if parameter.grad is not None:
                        self._held[parameter] = parameter.grad + self._held.get(parameter, 0)
            elif losses.any_known or totals.weight:  # any rank had data
                self._strategy.update_by(name)
            for parameter in parameters:  # another optimizer's hooks and clipping are to see its own alone
                parameter.grad = None

    @contextlib.contextmanager
    def _gradients(
        self, name: str, loss: torch.Tensor, weight: Any, retain_graph: bool
    ) -> Iterator[tuple[StepLosses, Totals]]:
        """Context in which an optimizer's parameters, and no others, have the gradients of a loss. **Collective**."""
        reducer = self._reducers[name]
        reducer.begin()
        scaled, unwanted = self._weigh(loss, weight, reducer.losses)
        reducer.expect_last()
        if not unwanted:
            torch.autograd.backward(scaled, inputs=self.parameters[name], retain_graph=retain_graph)
        reducer.add_slice(self.part.index)
        yield reducer.losses, reducer.finish()

    def _weigh(self, loss: torch.Tensor, weight: Any, losses: StepLosses) -> tuple[torch.Tensor, bool]:
        """See `Strategy.weigh`; a loss that is not finite is an error, if it is to be."""
        scaled, unwanted = self._strategy.weigh(self.part, loss, weight, losses, first=self.calls == 1)
        if self._strategy.plan.stop_on_nan:
            losses.check_finite(self._step + 1)
        assert scaled is not None
        return scaled, unwanted

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Context of steps that update nothing, see `put_held`. Local."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def put_held(self) -> None:
        """After a step that has updated nothing, set each gradient to the sum of those of its updates. Local."""
        assert self._held is not None
        for parameter in (parameter for own in self.parameters.values() for parameter in own):
            parameter.grad = self._held.get(parameter)

    def close(self) -> None:
        """Release the parameters. Local."""
        for reducer in self._reducers.values():
            reducer.close()

    def _agree(self, name: str | None) -> None:
        """Check that all ranks update by the same optimizer next. **Collective** over the data axis; waits for a GPU.

        Args:
            name: Of the optimizer; None at the end of the step.
        """
        channel = self._strategy.axes.data
        if channel.size == 1:
            return
        self._strategy.settle()
        code = -1 if name is None else zlib.crc32(name.encode())
        with channel.used_for("nbdist.update"):
            codes = [int(one) for one in channel.all_gather(torch.tensor([code], device=channel.device))]
        if len(set(codes)) > 1:
            here = "the end of the step" if name is None else f"nbdist.update {name}".rstrip()
            raise TaskError(
                f"ranks call nbdist.update for other optimizers, or not equally often (rank {channel.rank} is at "
                f"{here}): let each slice call the same ones in the same order, whatever its samples are."
            )


class ShardUpdates(RankUpdates):
    """The same where each rank holds a shard of every parameter: between two backwards all are put at rest.

    One reducer serves all optimizers. A backward runs through all that the loss depends on, and the gradients of other
    optimizers' parameters are dropped, as ``zero_grad`` does in a loop of one process.

    Args:
        strategy: See `RankUpdates`.
    """

    def __init__(self, strategy: MeshParallel) -> None:
        super().__init__(strategy, lambda _parameters: strategy.reducer)
        self._mesh = strategy

    @contextlib.contextmanager
    def _gradients(
        self, name: str, loss: torch.Tensor, weight: Any, retain_graph: bool
    ) -> Iterator[tuple[StepLosses, Totals]]:
        losses = self._mesh.reducer.losses
        scaled, unwanted = self._weigh(loss, weight, losses)
        with self._mesh.at_rest(scaled, unwanted, retain_graph):
            totals = self._mesh.reducer.finish()
            for other, parameters in self.parameters.items():
                for parameter in parameters if other != name else ():
                    parameter.grad = None
            self._mesh.mark_written([p for p in self.parameters[name] if p.grad is not None and self._held is None])
            yield losses, totals
