"""The interface of a mesh axis that changes the model, and what the axes of a mesh share."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.optim.precision import Precision
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placement import Placement
from nbdist.core.strategies.mesh_cost import AxisCost
from nbdist.core.strategies.pipeline.schedules import Action, run_plain_backward
from nbdist.core.strategies.readable_params import ReadableParams
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.sync.sync_batchnorm import BatchNorms
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan

__all__ = ["Example", "MeshAxis", "Placements", "Proposal", "agree_on_proposals"]

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


class Proposal(NamedTuple):
    """How an axis would change a model.

    Args:
        data: As JSON-able data, with which another rank does the same.
        cost: What that costs a rank.
        made: What rank 0 has made for it already, or None.
    """

    data: Any
    cost: AxisCost
    made: Any = None


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

    @classmethod
    @abstractmethod
    def propose(cls, task: Task, plan: Plan, example: Example) -> Proposal:
        """How the axis would change a whole model. Local; the model is left unchanged.

        Raises:
            PlanError: The model cannot be split as the plan says.
            TaskError: Its forward cannot be traced.
        """

    @abstractmethod
    def apply(self, proposal: Proposal, example: Example) -> None:
        """Change the model, and record where its tensors lie. **Collective** over the world.

        Args:
            proposal: Of rank 0; on the other ranks it came as JSON.
            example: The same on every rank.

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
        """Call at the start of a step. **Collective** over the axis."""

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T],
        compute: Callable[[Slice, tuple[Any, ...], Callable[[Any, Slice], T]], T],
    ) -> T | None:  # fmt: skip
        """See `Strategy.run_forward`; `compute` is `Strategy.compute`. **Collective** over a replica."""
        return compute(part, path, function)

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy.run_backward`. **Collective** over a replica."""
        run_plain_backward(loss, unwanted)

    def run_backward_within(self, loss: torch.Tensor, unwanted: bool, retain_graph: bool) -> None:
        """Run a backward within a step that goes on, see `MeshParallel.at_rest`. **Collective** over the axis."""
        raise NotImplementedError  # `check_combinations` refuses such steps on other axes

    def mark_written(self, parameters: Sequence[nn.Parameter]) -> None:  # noqa: B027
        """See `MeshParallel.mark_written`. Local."""

    def take_values(self) -> None:  # noqa: B027
        """Call after the optimizers have updated this rank's parts. Local."""

    def evaluate(
        self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T],
        compute: Callable[[Slice, tuple[Any, ...], Callable[[Any, Slice], T]], T],
    ) -> T | None:  # fmt: skip
        """See `Strategy.forward`; `compute` is `Strategy.compute`. **Collective** over a replica."""
        return compute(part, path, function)

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Context for the forwards and backwards of a step. **Collective** over the axis."""
        return contextlib.nullcontext()

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """Context for a forward without gradients. **Collective** over the axis."""
        return contextlib.nullcontext()

    def settle(self) -> None:  # noqa: B027
        """Call within `computing`, before a collective of others than this axis. **Collective** over the axis."""

    def sum_gradients(self) -> None:  # noqa: B027
        """Sum gradients over ranks of this axis, before those of data parallelism are. **Collective**."""

    def used(self) -> set[int]:
        """The ids of parameters whose gradients do not come from autograd's accumulation. Local."""
        return set()

    # The end of a run.

    def restore(self) -> None:  # noqa: B027
        """See `Strategy.restore_shards`. Local."""

    def gather(self) -> None:  # noqa: B027
        """Give all ranks what the forward has left in attributes of the model. **Collective** over the axis."""

    def free(self) -> None:  # noqa: B027
        """Free what only training needs, to make room for the whole weights. Local."""

    def close(self) -> None:  # noqa: B027
        """Undo what the model's forward does differently; parts stay parts. Local, twice is fine."""


def agree_on_proposals(
    kinds: Sequence[type[MeshAxis]], task: Task, plan: Plan, example: Example, channel: Channel
) -> list[Proposal]:
    """What rank 0 proposes for each axis, on every rank. **Collective**; the model is left unchanged.

    Raises:
        PlanError: The model cannot be split as the plan says.
        TaskError: Its forward cannot be traced.
    """
    proposals, message = list[Proposal](), dict[str, Any]()
    if channel.rank == 0:
        try:
            proposals = [kind.propose(task, plan, example) for kind in kinds]
            message = {"proposals": [proposal.data for proposal in proposals]}
        except (PlanError, TaskError) as error:
            message = {"error": type(error).__name__, "message": str(error)}
    message = json.loads(channel.broadcast_bytes(json.dumps(message).encode()))
    if "error" in message:
        raise {"PlanError": PlanError, "TaskError": TaskError}[message["error"]](message["message"])
    return proposals or [Proposal(data, AxisCost()) for data in message["proposals"]]
