"""The interface of a mesh axis that changes the model, and what the axes of a mesh share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.optim.precision import Precision
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placement import Placement
from nbdist.core.strategies.pipeline.schedules import Action, run_plain_backward
from nbdist.core.strategies.readable_params import ReadableParams
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.sync.sync_batchnorm import BatchNorms
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["Example", "MeshAxis", "Placements"]

T = TypeVar("T")
Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments with which the step calls the model."""


@dataclass(kw_only=True)
class Placements:
    """The model on its mesh, as the axes build it.

    Args:
        task: What is trained.
        plan: How.
        channels: This rank's channels, one for each axis.
        world: All ranks.
        table: Where each tensor's parts lie; each axis adds its part.
        readable: Which parameters may be read outside of the model's forward.
        precision: Of the forwards.
        batch_norms: Synchronizes BatchNorm statistics, or None.
        layouts: Each whole tensor on the meta device.
    """

    task: Task
    plan: Plan
    channels: MeshChannels
    world: World
    table: ParamTable
    readable: ReadableParams
    precision: Precision
    batch_norms: BatchNorms | None
    layouts: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.layouts = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.table.tensors.items()}

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.channels.world.device

    def record(self, name: str, **part: Any) -> None:
        """Record what an axis does to a tensor: fields of `Placement`. Local."""
        known = self.table.placements.get(name) or Placement(layout=self.layouts[name])
        placement = replace(known, **part)
        if not placement.whole:
            self.table.placements[name] = placement

    def release(self, name: str) -> None:
        """Release the values of a parameter that this rank does not hold. Local."""
        parameter = self.table.parameters[name]
        parameter.grad = None
        if self.table.placement(name).held(self.channels):
            parameter.data = parameter.data.clone()  # so that the payload with the whole model can be released
        else:
            self.readable.mark_absent(parameter)


class MeshAxis(ABC):
    """One axis of a mesh, as it changes a model.

    Args:
        placements: The model on its mesh.
        before: The axes that are applied before this one.

    Attributes:
        shards: The sharded parameters, of the axis that shards.
    """

    runs_slices = False
    """Whether the axis runs forwards or backwards itself; of several such axes the first does."""

    def __init__(self, placements: Placements, before: Sequence[MeshAxis]) -> None:
        self.placements = placements
        self.before = before
        self.shards: FullySharded | None = None

    # Before the first step.

    @abstractmethod
    def apply(self, example: Example) -> None:
        """Change the model, and record where its tensors lie. **Collective** over the world.

        Raises:
            PlanError: The model cannot be split as the plan says.
            TaskError: Its forward cannot be traced.
        """

    def prepare(self, after: Sequence[MeshAxis]) -> None:  # noqa: B027 - most axes have nothing to do
        """Call when all axes are applied, with those after this one. **Collective** over the world."""

    def stage_parameters(self) -> list[list[str]] | None:
        """The parameters of each stage of this rank; None if the axis makes no stages. Local."""
        return None

    def dry_run(self) -> contextlib.AbstractContextManager[None]:
        """Context in which this rank computes alone, to trace or time; the values do not matter. Local."""
        return contextlib.nullcontext()

    # A step.

    def begin_step(self) -> None:  # noqa: B027
        """Call at the start of a step. Local."""

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T],
        compute: Callable[[Slice, tuple[Any, ...], Callable[[Any, Slice], T]], T],
    ) -> T | None:  # fmt: skip
        """See `Strategy.run_forward`; `compute` is `Strategy.compute`. **Collective** over a replica."""
        return compute(part, path, function)

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy.run_backward`. **Collective** over a replica."""
        run_plain_backward(loss, unwanted)

    def evaluate(
        self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T],
        compute: Callable[[Slice, tuple[Any, ...], Callable[[Any, Slice], T]], T],
    ) -> T | None:  # fmt: skip
        """See `Strategy.forward`; `compute` is `Strategy.compute`. **Collective** over a replica."""
        return compute(part, path, function)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Context for the forwards and backwards of a step. Local."""
        return contextlib.nullcontext()

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """Context for a forward without gradients. Local."""
        return contextlib.nullcontext()

    def sum_gradients(self) -> None:  # noqa: B027
        """Sum gradients over ranks of this axis, before those of data parallelism are. **Collective**."""

    def used(self) -> set[int]:
        """The ids of parameters whose gradients do not come from autograd's accumulation. Local."""
        return set()

    # The end of a run.

    def restore(self) -> None:  # noqa: B027
        """See `Strategy.restore_shards`. Local."""

    def free(self) -> None:  # noqa: B027
        """Free what only training needs, to make room for the whole weights. Local."""

    def close(self) -> None:  # noqa: B027
        """Undo what the model's forward does differently; parts stay parts. Local, twice is fine."""
