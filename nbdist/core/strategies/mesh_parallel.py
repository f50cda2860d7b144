"""Any mesh: layers split over ``tp``, the model cut along ``pp``, parameters dealt out over ``shard``, and ``dp``.

The order is tp, pp, shard, dp. Each step changes where the parts of parameters lie, and the table says where that is:
sync, clipping, update, home-coming and checkpoints read it, and know nothing else of the mesh.
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
from nbdist.core.optim.optimizers import check_may_be_cut
from nbdist.core.optim.state import cut_state_, gather_state_
from nbdist.core.params.placement import Placement
from nbdist.core.process import rng
from nbdist.core.strategies import tensor as tensor_parallel
from nbdist.core.strategies.pipeline import partition
from nbdist.core.strategies.pipeline.executor import Pipeline
from nbdist.core.strategies.pipeline.model_call import call_of
from nbdist.core.strategies.readable_params import ReadableParams
from nbdist.core.strategies.shard.block_choice import blocks_of
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.strategies.strategy import Computed, Strategy
from nbdist.core.sync.gradient_sync import COUNTS, ControlFlags, GradientSync, Totals
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan

__all__ = ["MeshParallel"]

T = TypeVar("T")


class MeshParallel(Strategy):
    """A strategy for every mesh.

    **Collective**: the constructor gives every rank its parts of rank 0's weights and buffers.

    Args:
        task: See `Strategy`.
        plan: See `Strategy`.
        axes: See `Strategy`.
        world: Where the ranks are.

    Raises:
        PlanError: The model cannot be split or cut as the plan says.
        TaskError: Its forward cannot be recorded.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels, world: World) -> None:
        super().__init__(task, plan, axes)
        check_may_be_cut(task.optimizer, plan.mesh, comes_home=task.own_optimizer and plan.gather)
        self.even |= axes.shard.size > 1
        self._parallelized: tensor_parallel.Parallelized | None = None
        self._pipeline: Pipeline | None = None
        self._split: partition.Split | None = None
        self._shards: FullySharded | None = None
        self._reach = ReadableParams(self.table.parameters, plan)
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(axes.close)
        self._cleanup.callback(super().close)
        self._cleanup.callback(self._reach.close)
        try:
            self._begin(world)
        except BaseException:
            self.close()
            raise

    # What is made at the start.

    def _begin(self, world: World) -> None:
        axes, plan = self.axes, self.plan
        layouts = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.table.tensors.items()}
        self.table.broadcast_(axes.world)
        example = self._example()
        if axes.tp.size > 1:
            self._split_layers(*example)
        if axes.pp.size > 1:
            self._cut_into_stages(*example)
        self._place(layouts)
        if axes.shard.size > 1:
            self._deal_out(*example)
        cut_state_(self.task.optimizer, self.table, axes)
        self._tied = self._tie(world)
        if self._split is not None:
            self._pipeline = self._connect(world, self._split)
        self._held = self.table.held(axes)
        self._gradients = GradientSync(
            list(self._held.values()), axes.dp, full_batch=plan.batch_size, bucket_mib=plan.bucket_mib, overlap=False
        )
        self._cleanup.callback(self._gradients.close)

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the step calls the model with for the first samples, the same on every rank."""
        plan = self.plan
        samples = max(2, plan.batch_size // plan.slices)
        with rng.kept(self.device):
            rng.seed_all(rng.derive(plan.seed, "example"))
            batch = to_device(self.task.data.first(samples, consume=True), self.device)
            return call_of(self.task, batch)

    def _split_layers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model, channel = self.task.model, self.axes.tp
        if self.plan.tensor_plan is None:
            proposed = tensor_parallel.derive(model, channel.size, args, kwargs)
        else:
            proposed = tensor_parallel.written(model, channel.size, self.plan.tensor_plan, args, kwargs)
        proved = tensor_parallel.prove(model, channel, proposed, args, kwargs)
        self._parallelized = tensor_parallel.parallelize(model, channel, proved)
        self._cleanup.callback(self._parallelized.restore)
        self._reach.split(self._parallelized)

    def _cut_into_stages(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rank 0 measures and decides, for times differ from rank to rank."""
        model, plan, world = self.task.model, self.plan, self.axes.world
        told: Any = None
        with tensor_parallel.dry_run(self._parallelized):
            if world.rank == 0:
                try:
                    # What torch.export records has lost the layers that would measure together.
                    kinds = partition.KINDS if self.batch_norms is None else partition.KINDS[:1]
                    self._split = partition.split(model, args, kwargs, plan.stages, at=plan.split_at, kinds=kinds)
                    told = {"cuts": self._split.cuts}
                except (PlanError, TaskError) as error:
                    told = {"error": type(error).__name__, "message": str(error)}
            told = json.loads(world.broadcast_bytes(json.dumps(told).encode()))
            if "error" in told:
                raise {"PlanError": PlanError, "TaskError": TaskError}[told["error"]](told["message"])
            if self._split is None:
                self._split = partition.split(model, args, kwargs, plan.stages, cuts=told["cuts"])
        # A rank that failed at it is noticed here; where ranks link up, they would wait for it.
        world.all_reduce_(torch.zeros(1, device=self.device))
        self.infos = [asdict(info) for info in self._split.infos]

    def _place(self, layouts: dict[str, torch.Tensor]) -> None:
        """Write down where parts lie, and let go of what is not this rank's."""
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
                # In memory of its own: the payload that brought the whole model is let go of.
                if placement.held(self.axes):
                    parameter.data = parameter.data.clone()
                else:
                    self._reach.leave_out(parameter)

    def _deal_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        modules: list[nn.Module] = []
        if self._split is None:
            chosen = json.dumps(blocks_of(self.task.model, args, kwargs)).encode()
            told = json.loads(self.axes.world.broadcast_bytes(chosen))  # a forward may go another way on another rank
            modules = [self.task.model.get_submodule(name) for name, _ in told]
            blocks = [[self.table.parameters[name] for name in own] for _, own in told]
        else:  # one a stage of this rank; what two of them share, with the first
            stages = range(self.axes.pp.rank, self.plan.stages, self.axes.pp.size)
            blocks = []
            taken: set[str] = set()
            for stage in stages:
                new = {name for name in self.table.parameters if stage in self._split.holders[name]} - taken
                taken |= new
                blocks.append([p for name, p in self.table.parameters.items() if name in new])
        for name in self.table.parameters:  # those of other stages too: all ranks know where everything lies
            self.table.placements[name] = replace(self.table.placement(name), sharded=True)
        self._shards = FullySharded(blocks, self.axes.shard, self._reach.names, self._reach.check)
        self._cleanup.callback(self._shards.close)
        if modules:
            self._shards.hook(modules)

    def _tie(self, world: World) -> list[tuple[Channel, list[str]]]:
        """For each set of stages that hold a parameter together, a channel over them, and those parameters."""
        together: dict[tuple[int, ...], list[str]] = {}
        for name, placement in self.table.placements.items():
            if placement.stages is not None and len(placement.stages) > 1 and name in self.table.trainable:
                together.setdefault(placement.stages, []).append(name)
        tied = []
        for stages, names in sorted(together.items()):
            everywhere = len(stages) == self.axes.pp.size
            channel = self.axes.pp if everywhere else world.channel_within(self.axes.mesh.groups_of("pp", stages))
            if channel is not self.axes.world:
                self._cleanup.callback(channel.close)
            if self.axes.pp.rank in stages:
                tied.append((channel, names))
        return tied

    def _connect(self, world: World, split: partition.Split) -> Pipeline:
        links = world.links(self.axes.mesh.ring("pp"))
        line = next(line for line in self.axes.mesh.groups("pp") if world.rank in line)
        here = line.index(world.rank)
        before, after = links[line[here - 1]], links[line[(here + 1) % len(line)]]
        for link in links.values():
            self._cleanup.callback(link.close)
        return Pipeline(
            self.task, self.plan, split, here, before, after, self.device, self.precision, scaled=self.scaled,
            units=self.units, shards=self._shards, batch_norms=self.batch_norms, dry_run=self._rehearsed,
            guarded=self._reach.guarded,
        )  # fmt: skip

    @contextlib.contextmanager
    def _rehearsed(self) -> Iterator[None]:
        """Around what one rank computes by itself, of whose values nothing is asked."""
        together = contextlib.nullcontext() if self.batch_norms is None else self.batch_norms.alone()
        with tensor_parallel.dry_run(self._parallelized), together, self._reach.shown():
            yield

    # What a step does.

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._gradients.zero_()
        if self._shards is not None:
            self._shards.hide()

    def forward_backward(self, step: int, slices: list[Slice]) -> Computed:
        """See `Strategy`."""
        with contextlib.nullcontext() if self._shards is None else self._shards.saving():
            if self._pipeline is not None:
                computed = self._pipeline.forward_backward(slices, ("slice", step))
                self.work = self._pipeline.work
            elif self._shards is not None:
                computed = self._forward_backward_sharded(step, slices, self._shards)
            else:
                computed = super().forward_backward(step, slices)
        if self._shards is not None:
            self._shards.show(summed=True)
        return computed

    def compute(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T:
        """See `Strategy`."""
        with self._reach.guarded():
            return super().compute(part, path, function)

    def _forward_backward_sharded(self, step: int, slices: list[Slice], shards: FullySharded) -> Computed:
        """As `Strategy.forward_backward`; what counts for nothing is computed too, for others wait for it."""
        total: Any = 0
        losses: list[tuple[torch.Tensor, Any]] = []
        for position, part in enumerate(slices):
            loss, weight = self.compute(part, ("slice", step), self.task.loss_and_weight)
            counts = bool(part.samples) and (isinstance(weight, torch.Tensor) or weight != 0)
            units = self.units(weight if counts else 0, part, first=position == 0)
            self.silence(counts)
            shards.silent = not counts and self.batch_norms is None
            self.backward(loss, units if counts else 1, last=False)
            shards.finish_backward()
            if counts:
                total = total + units
                losses.append((loss.detach(), weight))
        if not slices:
            self.units(0, None)
        return total, losses

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """See `Strategy`."""
        if self._shards is not None:
            self._shards.hide()
        try:
            if self._pipeline is not None:
                return self._pipeline.forward(part, path, function)
            return super().forward(part, path, function)
        finally:
            if self._shards is not None:
                self._shards.show()

    @torch.no_grad()
    def sync(self, weight: Any, flags: ControlFlags, loss: tuple[Any, Any] = (0.0, 0.0)) -> Totals:
        """See `Strategy`."""
        for channel, names in self._tied:
            for name in names:
                gradient = self.table.parameters[name].grad
                assert gradient is not None
                total = gradient.contiguous()
                channel.all_reduce_(total)
                if total is not gradient:
                    gradient.copy_(total)
        reports_loss = self.axes.reports_loss
        used = self._used()
        flags = flags._replace(exhausted=float(flags.exhausted and reports_loss))
        told = [float(weight) * reports_loss, *map(float, loss), *flags]
        counts = torch.tensor([*told, *(name in used for name in self.table.trainable)], dtype=torch.float64)
        counts = counts.to(self.device)
        self.axes.replica.all_reduce_(counts)
        sums = counts.tolist()
        total_weight, lost, lost_weight, *agreed = sums[:COUNTS]
        hits = sums[COUNTS:]
        counted = dict(zip(self.table.trainable, hits, strict=True))
        used_here = [counted[name] > 0 for name in self._held]
        return self._gradients.finish(total_weight, ControlFlags(*agreed), loss=(lost, lost_weight), used=used_here)

    def _used(self) -> set[str]:
        """The parameters that have got a gradient on this rank."""
        seen = {name for name, hit in zip(self._held, self._gradients.used, strict=True) if hit}
        ids = set() if self._shards is None else self._shards.used
        return seen | {name for name, parameter in self._held.items() if id(parameter) in ids}

    def clip_(self, largest: float) -> None:
        """See `Strategy`."""
        factor = largest / (self.norm() + 1e-6)  # as torch does
        if factor < 1:
            self.scale_(factor.item())

    def norm(self) -> torch.Tensor:
        """See `Strategy`: each part counts once, however many ranks hold it."""
        held = {name: p.grad for name, p in self._held.items() if p.grad is not None}
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for name, norm in zip(held, torch._foreach_norm(list(held.values())) if held else (), strict=True):
            total += norm.double().square() / self.table.placement(name).copies(self.axes)
        self.axes.replica.all_reduce_(total)
        return total.sqrt()

    # What is done at the end.

    def restore_shards(self) -> None:
        """See `Strategy`."""
        if self._shards is not None:
            self._shards.show()

    def gather(self, *, keep: bool = True) -> None:
        """See `Strategy`. What nobody asks for any more makes room first."""
        self._gradients.close()
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
