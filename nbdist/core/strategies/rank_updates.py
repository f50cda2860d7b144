"""The updates within a step on one rank of data parallelism: gradients of one optimizer at a time are synchronized."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
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
        """Run the step on this rank's slice, of which `Strategy.equal_slices` gives it one. **Collective** (data axis).

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
        self._agree(())
        if part.samples:
            strategy.reducer.losses.add(part.index, loss, weight, strategy.units(weight, part, first=False))
        return strategy.reducer.losses

    def apply(self, names: Sequence[str], loss: torch.Tensor, weight: Any, retain_graph: bool) -> None:
        """See `StepUpdates`."""
        self._agree(names)
        parameters = self.parameters_of(names)
        with self._gradients(names, loss, weight, retain_graph) as (losses, totals):
            if self._held is not None:
                for parameter in parameters:
                    if parameter.grad is not None:
                        self._held[parameter] = parameter.grad + self._held.get(parameter, 0)
            elif losses.any_known or totals.weight:  # any rank had data
                self._strategy.update_by(names)
            for parameter in parameters:  # another optimizer's hooks and clipping are to see its own alone
                parameter.grad = None

    @contextlib.contextmanager
    def _gradients(
        self, names: Sequence[str], loss: torch.Tensor, weight: Any, retain_graph: bool
    ) -> Iterator[tuple[StepLosses, Totals]]:
        """Context in which these optimizers' parameters, and no others, have a loss's gradients. **Collective**."""
        first, *others = reducers = [self._reducers[name] for name in names]
        for reducer in reducers:
            reducer.begin()
        scaled, unwanted = self._weigh(loss, weight, first.losses)
        for reducer in reducers:
            reducer.losses = first.losses
            reducer.expect_last()
        if not unwanted:
            torch.autograd.backward(scaled, inputs=self.parameters_of(names), retain_graph=retain_graph)
        for reducer in reducers:
            reducer.add_slice(self.part.index)
        totals = first.finish()
        for reducer in others:
            reducer.finish()
        yield first.losses, totals

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
        for parameter in self.parameters_of(self.parameters):
            parameter.grad = self._held.get(parameter)

    def close(self) -> None:
        """Release the parameters. Local."""
        for reducer in self._reducers.values():
            reducer.close()

    def _agree(self, names: Sequence[str]) -> None:
        """Check that all ranks update by the same optimizers next. **Collective** over the data axis; waits for a GPU.

        Args:
            names: Of the optimizers; none at the end of the step.
        """
        channel = self._strategy.axes.data
        if channel.size == 1:
            return
        self._strategy.settle()
        code = zlib.crc32("\n".join(names).encode()) if names else -1
        with channel.used_for("nbdist.update"):
            codes = [int(one) for one in channel.all_gather(torch.tensor([code], device=channel.device))]
        if len(set(codes)) > 1:
            here = f"nbdist.update {', '.join(names)}".rstrip() if names else "the end of the step"
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
        self, names: Sequence[str], loss: torch.Tensor, weight: Any, retain_graph: bool
    ) -> Iterator[tuple[StepLosses, Totals]]:
        losses = self._mesh.reducer.losses
        scaled, unwanted = self._weigh(loss, weight, losses)
        with self._mesh.at_rest(scaled, unwanted, retain_graph):
            totals = self._mesh.reducer.finish()
            for parameter in self.parameters_of(self.parameters.keys() - {*names}):
                parameter.grad = None
            own = self.parameters_of(names) if self._held is None else ()
            self._mesh.mark_written([parameter for parameter in own if parameter.grad is not None])
            yield losses, totals
