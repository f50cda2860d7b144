"""Which parameters may be read outside the model's forward on a mesh: by the step, a metric or the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nbdist.core.params.placeholder import Placeholders, dummy, is_placeholder, reveal
from nbdist.core.strategies.tensor import Guard, Parallelized
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["ReadableParams"]


class ReadableParams:
    """Raises PlanError where code reads a parameter whose values are on other ranks or split over them.

    Args:
        parameters: The model's parameters by name.
        plan: The plan of the run.

    Attributes:
        names: The name of each parameter.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], plan: Plan) -> None:
        self.names = {parameter: name for name, parameter in parameters.items()}
        self._mesh = plan.mesh
        self._placeholders = Placeholders(self._refuse_absent)
        self._absent: list[nn.Parameter] = []
        self._stale: dict[torch.Tensor, str] = {}
        self._guard: Guard | None = None

    def mark_absent(self, parameter: nn.Parameter) -> None:
        """Replace a parameter whose values are on other ranks by a dummy. Local."""
        parameter.data = dummy(parameter, parameter.device)
        self._placeholders.hide(parameter)
        self._absent.append(parameter)

    def guard_split(self, parallelized: Parallelized) -> None:
        """Guard the parameters of layers that tensor parallelism splits. Local."""
        self._guard = Guard(parallelized, self._refuse_split)

    def mark_stale(self, buffers: dict[str, torch.Tensor]) -> None:
        """Buffers that the forward writes on other ranks: the step must not read what they hold here. Local."""
        self._stale |= {buffer: name for name, buffer in buffers.items()}

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """Context for the user's step: in it split parameters may be read in the model's forward only."""
        guard = contextlib.nullcontext() if self._guard is None else self._guard.active()
        return self._hiding(guard) if self._stale else guard

    @contextlib.contextmanager
    def _hiding(self, guard: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        for buffer in self._stale:
            self._placeholders.hide(buffer)
        try:
            with guard:
                yield
        finally:
            for buffer in self._stale:
                reveal(buffer)

    def check(self, parameters: list[nn.Parameter]) -> None:
        """Raise if these are read outside the forward of a split model. Local."""
        if self._guard is not None and self._guard.forbids:
            self._refuse_split(parameters, False)

    @contextlib.contextmanager
    def revealed(self) -> Iterator[None]:
        """Context in which absent parameters are plain dummies, for code that reads shapes and no values."""
        for parameter in self._absent:
            reveal(parameter)
        try:
            yield
        finally:
            for parameter in self._absent:
                self._placeholders.hide(parameter)

    def close(self) -> None:
        """Turn placeholders into ordinary parameters again; values on other ranks read as NaN. Local."""
        if self._guard is not None:
            self._guard.close()
        for parameter in self.names:
            reveal(parameter)

    def _refuse_absent(self, parameters: list[nn.Parameter], _data: bool) -> None:
        reader = "a layer of another rank, the step, a metric or the optimizer"
        raise self._error(parameters, reader, "whose values are on other ranks")

    def _refuse_split(self, parameters: list[nn.Parameter], _data: bool) -> None:
        reader = "something outside the model's forward (the step, a metric or the optimizer)"
        raise self._error(parameters, reader, "which is split over ranks, or whose gradient is summed over them,")

    def _error(self, parameters: list[nn.Parameter], reader: str, why: str) -> PlanError:
        found = next(parameter for parameter in parameters if is_placeholder(parameter))
        if found in self._stale:
            return PlanError(
                f"the step, or a metric, reads buffer {self._stale[found]}, which the model's forward writes on "
                f"another rank of mesh {self._mesh}: return its value from forward, or use the strategy data or shard."
            )
        name = self.names[found]
        others = "data or shard" if self._mesh.tp * self._mesh.pp > 1 else "data"
        return PlanError(
            f"{reader} reads parameter {name}, {why} on mesh {self._mesh}: leave it to the optimizer (a penalty on "
            f"weights is its weight_decay), or use the strategy {others}."
        )
