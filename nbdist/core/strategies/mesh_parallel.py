"""Any mesh: tensor parallel (``tp``), pipeline (``pp``), fully sharded (``shard``) and data parallel (``dp``) combined.

They are applied in that order. Each changes which rank holds which part of a parameter, and records it in the table.
Sync, clipping, update, the final gather and checkpoints read the table and know nothing else of the mesh.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice, to_device
from nbdist.core.optim.optimizers import check_can_be_sharded
from nbdist.core.optim.state import cut_state_, gather_state_
from nbdist.core.params.placement import Placement
from nbdist.core.process import rng
from nbdist.core.strategies import tensor as tensor_parallel
from nbdist.core.strategies.pipeline import partition
from nbdist.core.strategies.pipeline.capture_call import capture_call
from nbdist.core.strategies.pipeline.executor import Pipeline
from nbdist.core.strategies.pipeline.schedules import Action
from nbdist.core.strategies.readable_params import ReadableParams
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.strategies.shard.wrap_policy import blocks_of
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import ControlFlags
from nbdist.core.sync.bucketed_reducer import BucketedReducer
from nbdist.core.sync.step_tail import LOSS_NUMBERS, StepLosses, StepTail, Totals
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan

__all__ = ["MeshParallel"]

T = TypeVar("T")


class MeshParallel(Strategy):
    """The strategy for meshes with more than a ``dp`` axis.

    **Collective**: the constructor broadcasts rank 0's weights and buffers; every rank keeps its parts.

    Args:
        task: See `Strategy`.
        plan: See `Strategy`.
        axes: See `Strategy`.
        world: The process group of all ranks.

    Raises:
        PlanError: The model cannot be split as the plan says.
        TaskError: Its forward cannot be traced.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels, world: World) -> None:
        super().__init__(task, plan, axes)
        check_can_be_sharded(task.optimizer, plan.mesh, gathered=task.own_optimizer and plan.gather)
        self.equal_slices |= axes.shard.size > 1
        self._parallelized: tensor_parallel.Parallelized | None = None
        self._pipeline: Pipeline | None = None
        self._split: partition.Split | None = None
        self._shards: FullySharded | None = None
        self._readable = ReadableParams(self.table.parameters, plan)
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(axes.close)
        self._cleanup.callback(super().close)
        self._cleanup.callback(self._readable.close)
        try:
            self._set_up(world)
        except BaseException:
            self.close()
            raise

    # Setup.

    def _set_up(self, world: World) -> None:
        axes, plan = self.axes, self.plan
        layouts = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.table.tensors.items()}
        self.table.broadcast_(axes.world)
        example = self._example_call()
        if axes.tp.size > 1:
            self._split_layers(*example)
        if axes.pp.size > 1:
            self._cut_into_stages(*example)
        self._record_placements(layouts)
        if axes.shard.size > 1:
            self._shard_parameters(*example)
        cut_state_(self.task.optimizer, self.table, axes)
        self._tied = self._tied_channels(world)
        if self._split is not None:
            self._pipeline = self._make_pipeline(world, self._split)
            self.schedule, self.computes_loss = self._pipeline.schedule, self._pipeline.computes_loss
        self._held = self.table.held(axes)
        self.reducer = BucketedReducer(
            list(self._held.values()), axes.dp, full_batch=plan.batch_size, bucket_mib=plan.bucket_mib, overlap=False,
            sum_replica=self._sum_replica,
        )  # fmt: skip
        self._cleanup.callback(self.reducer.close)

    def _example_call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the step calls the model for the first samples, the same on every rank."""
        plan = self.plan
        samples = max(2, plan.batch_size // plan.slices)
        with rng.fork_rng(self.device):
            rng.seed_all(rng.derive(plan.seed, "example"))
            batch = to_device(self.task.data.first(samples, consume=True), self.device)
            return capture_call(self.task, batch)

    def _split_layers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model, channel = self.task.model, self.axes.tp
        if self.plan.tensor_plan is None:
            proposed = tensor_parallel.derive_plan(model, channel.size, args, kwargs)
        else:
            proposed = tensor_parallel.plan_from_rules(model, channel.size, self.plan.tensor_plan, args, kwargs)
        verified = tensor_parallel.verify_plan(model, channel, proposed, args, kwargs)
        self._parallelized = tensor_parallel.parallelize(model, channel, verified)
        self._cleanup.callback(self._parallelized.restore)
        self._readable.guard_split(self._parallelized)

    def _cut_into_stages(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rank 0 measures and chooses the cuts, and broadcasts them: measured times differ from rank to rank."""
        model, plan, world = self.task.model, self.plan, self.axes.world
        message: Any = None
        with tensor_parallel.dry_run(self._parallelized):
            if world.rank == 0:
                try:
                    # torch.export's graph has no BatchNorm modules left to synchronize.
                    kinds = partition.KINDS if self.batch_norms is None else partition.KINDS[:1]
                    self._split = partition.split(model, args, kwargs, plan.stages, at=plan.split_at, kinds=kinds)
                    message = {"cuts": self._split.cuts}
                except (PlanError, TaskError) as error:
                    message = {"error": type(error).__name__, "message": str(error)}
            message = json.loads(world.broadcast_bytes(json.dumps(message).encode()))
            if "error" in message:
                raise {"PlanError": PlanError, "TaskError": TaskError}[message["error"]](message["message"])
            if self._split is None:
                self._split = partition.split(model, args, kwargs, plan.stages, cuts=message["cuts"])
        # If a rank failed to cut, this collective raises. Without it, ranks would wait for that one when links open.
        world.all_reduce_(torch.zeros(1, device=self.device))
        self.infos = [asdict(info) for info in self._split.infos]

    def _record_placements(self, layouts: dict[str, torch.Tensor]) -> None:
        """Record the placement of each tensor, and release the values that this rank does not hold."""
        cuts = {} if self._parallelized is None else self._parallelized.cuts
        for name, layout in layouts.items():
            stages = None
            if self._split is not None:
                stages = tuple(sorted({stage % self.axes.pp.size for stage in self._split.holders[name]}))
            placement = Placement(layout=layout, stages=stages, cut=cuts.get(name))
            if placement.whole:
                continue
            self.table.placements[name] = placement
            if name in self.table.parameters:
                parameter = self.table.parameters[name]
                parameter.grad = None
                # Cloned, so that the payload with the whole model can be released.
                if placement.held(self.axes):
                    parameter.data = parameter.data.clone()
                else:
                    self._readable.mark_absent(parameter)

    def _shard_parameters(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modules: list[nn.Module] = []
        if self._split is None:
            local = json.dumps(blocks_of(self.task.model, args, kwargs)).encode()
            chosen = json.loads(self.axes.world.broadcast_bytes(local))  # forward may branch otherwise on another rank
            modules = [self.task.model.get_submodule(name) for name, _ in chosen]
            blocks = [[self.table.parameters[name] for name in own] for _, own in chosen]
        else:  # one block for each stage of this rank; a parameter that two stages share is in the first one's
            stages = range(self.axes.pp.rank, self.plan.stages, self.axes.pp.size)
            blocks = []
            taken: set[str] = set()
            for stage in stages:
                new = {name for name in self.table.parameters if stage in self._split.holders[name]} - taken
                taken |= new
                blocks.append([p for name, p in self.table.parameters.items() if name in new])
        for name in self.table.parameters:  # those of other stages too: the table is the same on all ranks
            self.table.placements[name] = replace(self.table.placement(name), sharded=True)
        self._shards = FullySharded(blocks, self.axes.shard, self._readable.names, self._readable.check)
        self._cleanup.callback(self._shards.close)
        if modules:
            self._shards.hook(modules)

    def _tied_channels(self, world: World) -> list[tuple[Channel, list[str]]]:
        """For each set of stages that share a tied parameter: a channel over them, and the parameters' names."""
        shared: dict[tuple[int, ...], list[str]] = {}
        for name, placement in self.table.placements.items():
            if placement.stages is not None and len(placement.stages) > 1 and name in self.table.trainable:
                shared.setdefault(placement.stages, []).append(name)
        tied = []
        for stages, names in sorted(shared.items()):
            everywhere = len(stages) == self.axes.pp.size
            channel = self.axes.pp if everywhere else world.channel_within(self.axes.mesh.groups_of("pp", stages))
            if channel is not self.axes.world:
                self._cleanup.callback(channel.close)
            if self.axes.pp.rank in stages:
                tied.append((channel, names))
        return tied

    def _make_pipeline(self, world: World, split: partition.Split) -> Pipeline:
        links = world.links(self.axes.mesh.ring("pp"))
        line = next(line for line in self.axes.mesh.groups("pp") if world.rank in line)
        rank = line.index(world.rank)
        before, after = links[line[rank - 1]], links[line[(rank + 1) % len(line)]]
        for link in links.values():
            self._cleanup.callback(link.close)
        return Pipeline(
            self.task, self.plan, split, rank, before, after, self.device, self.precision, shards=self._shards,
            batch_norms=self.batch_norms, dry_run=self._dry_run, guarded=self._readable.guarded,
        )  # fmt: skip

    @contextlib.contextmanager
    def _dry_run(self) -> Iterator[None]:
        """Context in which one rank computes alone, to trace or time; the values do not matter."""
        together = contextlib.nullcontext() if self.batch_norms is None else self.batch_norms.local_only()
        with tensor_parallel.dry_run(self._parallelized), together, self._readable.revealed():
            yield

    # One step.

    def begin_step(self) -> None:
        """See `Strategy`."""
        super().begin_step()
        if self._shards is not None:
            self._shards.hide_shards()

    def forward_backward(self, step: int, slices: list[Slice]) -> StepLosses:
        """See `Strategy`."""
        if self._pipeline is not None:
            self.work = self._pipeline.work = []
        if self._shards is None:
            return super().forward_backward(step, slices)
        with self._shards.saving():
            losses = super().forward_backward(step, slices)
        self._shards.expose_shards(summed=True)
        return losses

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]
    ) -> T | None:
        """See `Strategy`."""
        if self._pipeline is not None:
            return self._pipeline.run_forward(action, part, path, function)
        return super().run_forward(action, part, path, function)

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy`."""
        if self._pipeline is not None:
            self._pipeline.run_backward(action, loss, unwanted)
        elif self._shards is not None and loss is not None:
            self._shards.run_backward(loss, unwanted)
        else:
            super().run_backward(action, loss, unwanted)

    def compute(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T:
        """See `Strategy`."""
        with self._readable.guarded():
            return super().compute(part, path, function)

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """See `Strategy`."""
        if self._shards is not None:
            self._shards.hide_shards()
        try:
            if self._pipeline is not None:
                return self._pipeline.forward(part, path, function)
            return super().forward(part, path, function)
        finally:
            if self._shards is not None:
                self._shards.expose_shards()

    @torch.no_grad()
    def sync(self, flags: ControlFlags) -> Totals:
        """See `Strategy`."""
        for channel, names in self._tied:
            for name in names:
                gradient = self.table.parameters[name].grad
                assert gradient is not None
                total = gradient.contiguous()
                channel.all_reduce_(total)
                if total is not gradient:
                    gradient.copy_(total)
        return super().sync(flags)

    def _sum_replica(
        self, losses: tuple[Any, ...], flags: ControlFlags, used: list[bool]
    ) -> tuple[list[float], ControlFlags, list[bool]]:
        """See `SumReplica`: of ranks that compute the same loss, one counts. **Collective** over the replica."""
        if not self.axes.reports_loss:
            losses, flags = (0.0,) * LOSS_NUMBERS, flags._replace(exhausted=0.0)
        here = {name for name, hit in zip(self._held, used, strict=True) if hit}
        if self._shards is not None:
            here |= {name for name, parameter in self._held.items() if id(parameter) in self._shards.used}
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
        if self._shards is not None:
            self._shards.expose_shards()

    def gather(self, *, keep: bool = True) -> None:
        """See `Strategy`. Gradients and blocks are freed first, to make room for the whole weights."""
        self.reducer.close()
        if self._shards is not None:
            self._shards.close()
        if self.task.own_optimizer:
            gather_state_(self.task.optimizer, self.table, self.axes, keep=keep)
        else:
            self.task.optimizer.state.clear()
        self.table.gather_(self.axes, keep=keep)

    def close(self) -> None:
        """See `Strategy`."""
        self._cleanup.close()
