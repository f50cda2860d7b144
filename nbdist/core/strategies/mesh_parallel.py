"""Any mesh: tensor parallel (``tp``), pipeline (``pp``), fully sharded (``shard``) and data parallel (``dp``) combined.

The first three change the model, in that order, each in its own way (`mesh_axis.py`). Each changes which rank
holds which part of a parameter, and records it in the table. Sync, clipping, update, the final gather and checkpoints
read the table and know nothing else of the mesh.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice, copy_batch, to_device
from nbdist.core.optim.optimizers import check_can_be_sharded
from nbdist.core.optim.state import cut_state_, gather_state_
from nbdist.core.params.func_transforms import transforms_refused
from nbdist.core.params.iterator_watch import IteratorWatch
from nbdist.core.params.preserve_model import device_of
from nbdist.core.params.program_state import ProgramState
from nbdist.core.process import rng
from nbdist.core.strategies.mesh_axis import Example, MeshAxis, Placements, agree_on_proposals
from nbdist.core.strategies.mesh_cost import MeshCost, cost_of
from nbdist.core.strategies.pipeline.capture_call import capture_call
from nbdist.core.strategies.pipeline.schedules import Action
from nbdist.core.strategies.pipeline_axis import PipelineAxis
from nbdist.core.strategies.rank_updates import ShardUpdates
from nbdist.core.strategies.readable_params import ReadableParams
from nbdist.core.strategies.shard_axis import ShardAxis
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.strategies.tensor_axis import TensorAxis
from nbdist.core.sync.agreement import ControlFlags
from nbdist.core.sync.bucketed_reducer import BucketedReducer
from nbdist.core.sync.gradient_hooks import GradientHooks, check_hooks
from nbdist.core.sync.step_tail import LOSS_NUMBERS, StepLosses, StepTail, Totals
from nbdist.core.task.step_updates import IgnoredUpdates
from nbdist.core.task.task import Task
from nbdist.core.transfer.file_memory import FileMemory
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["MeshParallel", "estimate"]

T = TypeVar("T")
_AXES: dict[str, type[MeshAxis]] = {"tp": TensorAxis, "pp": PipelineAxis, "shard": ShardAxis}
"""The axes that change the model, in the order in which they are applied."""


_SMALL_BYTES = 2**20
"""Larger tensors that the step reaches beside the model, such as a teacher's weights, are only read before its call."""


def example_call(task: Task, plan: Plan, device: torch.device) -> Example:
    """The arguments with which the step calls the model for the first samples, the same on every rank. Local."""
    samples = max(2, plan.batch_size // plan.slices)
    with rng.fork_rng(device):
        rng.seed_all(rng.derive(plan.seed, "example"))
        batch = to_device(copy_batch(task.data.first(samples, consume=True)), device)
        return capture_call(task.model, lambda: task.step(task.model, batch))


def estimate(task: Task, plan: Plan) -> MeshCost:
    """Whether a plan's mesh can be applied to a task, and what it costs a rank. Local; the model is left unchanged.

    The first samples are read, also of a stream.

    Raises:
        PlanError: The mesh cannot be applied: the model cannot be split, or its optimizers or hooks do not allow it.
        TaskError: The model's forward cannot be traced.
    """
    check_hooks(task.model, task.optimizers.values(), plan.mesh)
    if plan.mesh.size == plan.mesh.dp:
        return cost_of(task.model, task.optimizers.values(), plan, {})
    _check_optimizers(task, plan)
    kinds = {name: kind for name, kind in _AXES.items() if getattr(plan.mesh, name) > 1}
    with IgnoredUpdates.of(task):
        example = example_call(task, plan, device_of(task.model))
        costs = {name: kind.propose(task, plan, example).cost for name, kind in kinds.items()}
    return cost_of(task.model, task.optimizers.values(), plan, costs)


def _check_optimizers(task: Task, plan: Plan) -> None:
    for optimizer in task.optimizers.values():
        check_can_be_sharded(optimizer, plan.mesh, gathered=task.own_optimizers and plan.gather)


class MeshParallel(Strategy):
    """The strategy for meshes with more than a ``dp`` axis.

    **Collective**: the constructor broadcasts rank 0's weights and buffers; every rank keeps its parts.

    Args:
        task: See `Strategy`.
        plan: See `Strategy`.
        axes: See `Strategy`.
        world: The process group of all ranks.
        hooks: See `Strategy`.

    Raises:
        PlanError: The model cannot be split as the plan says.
        TaskError: Its forward cannot be traced.
    """

    def __init__(
        self, task: Task, plan: Plan, axes: MeshChannels, world: World, hooks: GradientHooks | None = None
    ) -> None:
        super().__init__(task, plan, axes, hooks)
        _check_optimizers(task, plan)
        self.equal_slices |= axes.shard.size > 1
        self._readable = ReadableParams(self.table.parameters, plan)
        placements = Placements(
            task=task, plan=plan, channels=axes, world=world, table=self.table, readable=self._readable,
            precision=self.precision, batch_norms=self.batch_norms,
        )  # fmt: skip
        self._axes: list[MeshAxis] = []
        for name, kind in _AXES.items():
            if getattr(plan.mesh, name) > 1:
                self._axes.append(kind(placements, tuple(self._axes)))
        self._runner = next((axis for axis in self._axes if axis.runs_slices), self._axes[0])
        self._cleanup, self._computing = contextlib.ExitStack(), contextlib.ExitStack()
        if plan.mesh.tp * plan.mesh.shard > 1 and "torch._dynamo" in sys.modules:
            # A compiler traces no gathers and no collectives; nothing is compiled where it is not loaded.
            self._cleanup.enter_context(torch.compiler.set_stance("force_eager"))
        self._cleanup.callback(axes.close)
        self._cleanup.callback(super().close)
        self._cleanup.callback(self._readable.close)
        for axis in self._axes:
            self._cleanup.callback(axis.close)
        try:
            self._apply()
        except BaseException:
            self.close()
            raise

    def _apply(self) -> None:
        axes, plan = self.axes, self.plan
        # Both run the user's code, on some ranks more often than on others: what it counts or keeps is put back.
        weights = [*self.task.model.parameters()]
        of_model = ProgramState({"model": self.task.model}, unwritten=weights, most=None)
        of_step = ProgramState({"step": self.task.step}, unwritten=weights, large_bytes=_SMALL_BYTES, most=None)
        try:
            with IteratorWatch(of_step.iterators.values()) as watch, IgnoredUpdates.of(self.task):
                example = example_call(self.task, plan, self.device)
            if advanced := [*of_model.iterators, *(of_step.iterators if watch.taken else ())]:
                raise PlanError(
                    f"the step or the model takes from {advanced[0]}, an iterator, which dry runs for mesh {plan.mesh} "
                    "advance, and nobody can put back: keep a number or a list in its place, or use the strategy data."
                )
            kinds = [type(axis) for axis in self._axes]
            with IgnoredUpdates.of(self.task):
                # before a weight is touched
                proposals = agree_on_proposals(kinds, self.task, plan, example, axes.world)
        finally:
            of_step.restore()
            of_model.restore()
        self.table.broadcast_(axes.world)
        for axis, proposal in zip(self._axes, proposals, strict=True):
            axis.apply(proposal, example)
        for optimizer in self.task.optimizers.values():
            cut_state_(optimizer, self.table, axes)
        for place, axis in enumerate(self._axes):
            axis.prepare(self._axes[place + 1 :])
        if isinstance(self._runner, PipelineAxis):
            self.infos = self._runner.infos
            self.schedule, self.computes_loss = self._runner.pipeline.schedule, self._runner.pipeline.computes_loss
        self._held = self.table.held(axes)
        self.reducer = BucketedReducer(
            list(self._held.values()), axes.dp, full_batch=plan.batch_size, bucket_mib=plan.bucket_mib, overlap=False,
            sum_replica=self._sum_replica,
        )  # fmt: skip
        self._cleanup.callback(self.reducer.close)
        if self.task.updates:
            self.updates = ShardUpdates(self)

    # One step.

    def begin_step(self) -> None:
        """See `Strategy`."""
        super().begin_step()
        for axis in self._axes:
            axis.begin_step()

    def forward_backward(self, step: int, slices: list[Slice]) -> StepLosses:
        """See `Strategy`."""
        with self._computing:
            self._compute()
            losses = super().forward_backward(step, slices)
        if isinstance(self._runner, PipelineAxis):
            self.work = self._runner.pipeline.work
        return losses

    def _compute(self) -> None:
        for axis in self._axes:
            self._computing.enter_context(axis.computing())

    @contextlib.contextmanager
    def at_rest(self, loss: torch.Tensor, unwanted: bool, retain_graph: bool) -> Iterator[None]:
        """Context within a step: after a backward, parameters are this rank's parts, with gradients. **Collective**.

        Args:
            loss: From where to run backward.
            unwanted: As for `run_backward`.
            retain_graph: As for ``backward``.
        """
        self._runner.run_backward_within(loss, unwanted, retain_graph)
        self._computing.close()
        with torch.no_grad():
            for axis in self._axes:
                axis.sum_gradients()
        yield
        self.begin_step()
        self._compute()

    def mark_written(self, parameters: list[nn.Parameter]) -> None:
        """Call before an optimizer writes to parameters within a step, whose graphs may need the old ones. Local."""
        for axis in self._axes:
            axis.mark_written(parameters)

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]
    ) -> T | None:
        """See `Strategy`."""
        return self._runner.run_forward(action, part, path, function, self.compute)

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy`."""
        self._runner.run_backward(action, loss, unwanted)

    def settle(self) -> None:
        """See `Strategy`."""
        for axis in self._axes:
            axis.settle()

    def compute(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T:
        """See `Strategy`."""
        with self._readable.guarded(), transforms_refused():
            return super().compute(part, path, function)

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """See `Strategy`."""
        with contextlib.ExitStack() as stack:
            for axis in self._axes:
                stack.enter_context(axis.evaluating())
            return self._runner.evaluate(part, path, function, self.compute)

    def take_values(self) -> None:
        """See `Strategy`."""
        for axis in self._axes:
            axis.take_values()

    @torch.no_grad()
    def sync(self, flags: ControlFlags) -> Totals:
        """See `Strategy`."""
        for axis in self._axes:
            axis.sum_gradients()
        return super().sync(flags)

    def _sum_replica(
        self, losses: tuple[Any, ...], flags: ControlFlags, used: list[bool]
    ) -> tuple[list[float], ControlFlags, list[bool]]:
        """See `SumReplica`: of ranks that compute the same loss, one counts. **Collective** over the replica."""
        if not self.axes.reports_loss:
            losses = (0.0,) * LOSS_NUMBERS
        here = {name for name, hit in zip(self._held, used, strict=True) if hit}
        ids = set[int]().union(*(axis.used() for axis in self._axes))
        here |= {name for name, parameter in self._held.items() if id(parameter) in ids}
        tail, names = StepTail(len(self.table.trainable)), list(self.table.trainable)
        sums = torch.zeros(tail.numel, dtype=torch.float64, device=self.device)
        tail.write(sums, losses, flags, [name in here for name in names])
        self.axes.replica.all_reduce_(sums)
        counts = dict(zip(names, tail.used(sums), strict=True))
        return (
            tail.losses(sums)[0].tolist(),
            ControlFlags(*tail.flags(sums).tolist()),
            [counts[name] > 0 for name in self._held],
        )

    def clip_(self, largest: float) -> None:
        """See `Strategy`."""
        factor = largest / (self.norm() + 1e-6)  # as torch does
        if factor < 1:
            self.scale_(factor.item())

    def norm(self) -> torch.Tensor:
        """See `Strategy`; a part that several ranks hold counts once."""
        held = {name: p.grad for name, p in self._held.items() if p.grad is not None}
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for name, norm in zip(held, torch._foreach_norm(list(held.values())) if held else (), strict=True):
            total += norm.double().square() / self.table.placement(name).copies(self.axes)
        self.axes.replica.all_reduce_(total)
        return total.sqrt()

    # The end of a run.

    def restore_shards(self) -> None:
        """See `Strategy`."""
        for axis in self._axes:
            axis.restore()

    def gather(self, *, keep: bool = True) -> None:
        """See `Strategy`. Gradients and blocks are freed first, to make room for the whole weights."""
        self.reducer.close()
        for axis in self._axes:
            axis.gather()
            axis.free()
        for optimizer in self.task.optimizers.values():
            if self.task.own_optimizers:
                gather_state_(optimizer, self.table, self.axes, keep=keep)
            else:
                optimizer.state.clear()
        in_file = FileMemory().empty_like if self.task.in_file else None
        self.table.gather_(self.axes, keep=keep, empty_like=in_file)

    def close(self) -> None:
        """See `Strategy`."""
        self._cleanup.close()
