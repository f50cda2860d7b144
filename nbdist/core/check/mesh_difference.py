"""Where a step on a mesh differs from the same step of one process: loss, gradients, updates, buffers, extra state."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nbdist.core.check.plain_step import StepResult
from nbdist.core.check.rounding import Rounding
from nbdist.core.check.sentences import (
    FIRST_FORWARD,
    GATHERED,
    OPTIMIZER,
    apart,
    off_on_mesh,
    other_log_on_mesh,
    unlike,
)
from nbdist.core.optim.optimizers import step_optimizers
from nbdist.core.params.extra_state import extra_states
from nbdist.core.params.value_records import same_state
from nbdist.core.strategies.strategy import Strategy

__all__ = ["MeshDifference"]

_UPDATE = 1e-3
"""The largest error of an update, as a share of it: some optimizers sum over the parts of a tensor in another order."""


class MeshDifference:
    """Compares what this rank has of a step with that of one process. Local.

    Each method returns the sentence for the first difference that rounding does not explain, or an empty string.

    Args:
        strategy: Of the mesh.
        expected: The step of one process.
        rounding: Its rounding.
        samples: How many samples the step has.
        gathers: Whether the step calls `nbdist.gather`.
    """

    def __init__(
        self, strategy: Strategy, expected: StepResult, rounding: Rounding, samples: int, *, gathers: bool = False
    ) -> None:
        self._strategy, self._expected, self._rounding, self._samples = strategy, expected, rounding, samples
        self._gathers = gathers
        axes, table = strategy.axes, strategy.table
        self._updated = {
            name: parameter
            for name, parameter in table.trainable.items()
            if table.placement(name).held(axes) and table.is_updated(name, axes)
        }

    def of_loss(self, loss: float | None) -> str:
        """That of the mean loss."""
        if loss is None:
            return self._words("the loss", "is missing")
        if self._rounding.differs_loss(self._expected.loss, loss):
            return self._words("the loss", "is {}, not {}".format(*unlike(loss, self._expected.loss)))
        return ""

    def of_log(self, log: Mapping[str, float]) -> list[str]:
        """Notes on numbers that the step logs, and that are others here."""
        mesh, expected = self._strategy.axes.mesh, self._expected.logged
        other = [n for n in log.keys() & expected if self._rounding.differs_log(n, expected[n], log[n])]
        return [other_log_on_mesh(name, mesh, log[name], expected[name]) for name in sorted(other)]

    def of_gradients(self) -> str:
        """That of the gradients, after hooks and clipping."""
        for name, parameter in self._updated.items():
            if name not in self._expected.gradients:
                continue
            whole, got = self._expected.gradients[name], parameter.grad
            if whole is None or got is None:
                if (whole is None) != (got is None) and bool((got if whole is None else whole).any()):  # type: ignore[union-attr]
                    how = "is missing" if got is None else "should not be there"
                    return self._words(f"the gradient of {name}", how)
                continue
            part = self._part(name, whole)
            if self._rounding.differs("gradient", name, part, got.reshape(part.shape)):
                return self._words(f"the gradient of {name}", apart(part, got))
        return ""

    def of_state(self) -> str:
        """That of buffers and extra state, after the replicas' buffers are averaged."""
        axes, table, expected = self._strategy.axes, self._strategy.table, self._expected
        for name, buffer in table.buffers.items():
            if name not in expected.buffers or not table.placement(name).held(axes):
                continue
            part = self._part(name, expected.buffers[name])
            if self._rounding.differs("buffer", name, part, buffer.reshape(part.shape)):
                return self._words(f"buffer {name}", apart(part, buffer))
        if axes.data.rank == 0 and axes.mesh.pp == 1:
            for name, extra in extra_states(self._strategy.task.model).items():
                if not same_state(extra, expected.extra.get(name)):
                    return self._words(f"the extra state of {name or 'the model'}", "differs")
        return ""

    @torch.no_grad()
    def of_update(self) -> str:
        """That of an update by the gradients of the one process, on this rank's parts. It is left to be undone."""
        expected = self._expected
        if not expected.updated:
            return ""
        before = {name: parameter.detach().clone() for name, parameter in self._updated.items()}
        for name, parameter in self._updated.items():
            whole = expected.gradients[name]
            if whole is None:  # a second pass may have used it
                parameter.grad = None
            elif parameter.grad is None or not parameter.grad.is_sparse:
                parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad.copy_(self._part(name, whole).reshape(parameter.shape))
        try:
            with torch.enable_grad():
                step_optimizers(self._strategy.task.optimizers.values())
        finally:
            self._strategy.take_values()
        for name, parameter in self._updated.items():
            part = self._part(name, expected.updated[name]).double()
            got = parameter.detach().reshape(part.shape).double()
            moved = torch.linalg.vector_norm(part - before[name].reshape(part.shape).double())
            rounded = torch.finfo(parameter.dtype).eps * torch.linalg.vector_norm(part)
            if torch.linalg.vector_norm(got - part) > rounded + _UPDATE * moved:
                return self._words(f"the update of {name}", apart(part, got), of_optimizer=True)
        return ""

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        placement = self._strategy.table.placement(name)
        return whole if placement.whole else placement.part(whole, self._strategy.axes)

    def _words(self, what: str, how: str, *, of_optimizer: bool = False) -> str:
        mesh = self._strategy.axes.mesh
        of_update = OPTIMIZER if mesh.size > mesh.dp else FIRST_FORWARD
        of_step = GATHERED if self._gathers else None
        return off_on_mesh(mesh, what, how, self._samples, of_update if of_optimizer else of_step)
