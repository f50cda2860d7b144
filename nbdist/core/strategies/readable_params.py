"""What of the parameters the step, a metric or the optimizer may read on a mesh, beside the model's forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from nbdist.core.params.placeholder import Placeholders, dummy, is_placeholder, reveal
from nbdist.core.strategies.tensor import Guard, Parallelized
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["ReadableParams"]


class ReadableParams:
    """Refuses whoever reads a parameter that is not here, or that is a part of one.

    Args:
        parameters: The model's, by name.
        plan: What is run.

    Attributes:
        names: What the parameters are called.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], plan: Plan) -> None:
        self.names = {parameter: name for name, parameter in parameters.items()}
        self._mesh = plan.mesh
        self._placeholders = Placeholders(self._refuse_absent)
        self._absent: list[nn.Parameter] = []
        self._guard: Guard | None = None

    def leave_out(self, parameter: nn.Parameter) -> None:
        """Its values lie on other ranks. Local."""
        parameter.data = dummy(parameter, parameter.device)
        self._placeholders.hide(parameter)
        self._absent.append(parameter)

    def split(self, parallelized: Parallelized) -> None:
        """Layers are split over ranks. Local."""
        self._guard = Guard(parallelized, self._refuse_split)

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """Around what the user's step computes beside the model's forward."""
        return contextlib.nullcontext() if self._guard is None else self._guard.up()

    def check(self, parameters: list[nn.Parameter]) -> None:
        """Refuse where layers are split and no forward computes. Local."""
        if self._guard is not None and self._guard.forbids:
            self._refuse_split(parameters, False)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Around what looks at the model and asks for none of its values."""
        for parameter in self._absent:
            reveal(parameter)
        try:
            yield
        finally:
            for parameter in self._absent:
                self._placeholders.hide(parameter)

    def close(self) -> None:
        """Let what is left of a model in parts be ordinary parameters; what is not here shows as NaN. Local."""
        if self._guard is not None:
            self._guard.close()
        for parameter in self.names:
            reveal(parameter)

    def _refuse_absent(self, parameters: list[nn.Parameter], _data: bool) -> None:
        raise self._error(parameters, "whose values lie on other ranks")

    def _refuse_split(self, parameters: list[nn.Parameter], _data: bool) -> None:
        raise self._error(parameters, "which is split over ranks, or whose gradient they add up,")

    def _error(self, parameters: list[nn.Parameter], why: str) -> PlanError:
        name = next(self.names[parameter] for parameter in parameters if is_placeholder(parameter))
        others = "data or shard" if self._mesh.tp * self._mesh.pp > 1 else "data"
        return PlanError(
            f"something beside the model's forward (the step, a metric or the optimizer) reads parameter {name}, {why} "
            f"on mesh {self._mesh}: leave it to the optimizer (a penalty on weights is its weight_decay), or use the "
            f"strategy {others}."
        )
