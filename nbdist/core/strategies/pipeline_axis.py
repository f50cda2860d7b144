"""The ``pp`` axis: the model is cut into stages, which its ranks compute one after another."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.data.reader import Slice, copy_batch
from nbdist.core.params.extra_state import stateful_modules
from nbdist.core.params.preserve_model import preserve_model
from nbdist.core.params.tagged_json import to_json
from nbdist.core.strategies.mesh_axis import Example, MeshAxis, Placements, Proposal, agree_on_proposals
from nbdist.core.strategies.mesh_cost import AxisCost
from nbdist.core.strategies.pipeline import partition
from nbdist.core.strategies.pipeline.executor import Pipeline
from nbdist.core.strategies.pipeline.schedules import Action
from nbdist.core.sync.sync_batchnorm import BatchNorms
from nbdist.core.task.task import Task
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["PipelineAxis"]

T = TypeVar("T")


def check_root_state(model: nn.Module, example: Example) -> dict[str, nn.Module]:
    """The modules with extra state that are called as a whole; not the model itself, which is cut. Local.

    Raises:
        PlanError: The model's own forward changes its extra state.
    """
    stateful = stateful_modules(model)
    root = stateful.pop("", None)
    if root is not None:
        args, kwargs = copy_batch(example)
        with preserve_model(model), torch.no_grad():
            before = json.dumps(to_json(root.get_extra_state(), "the extra state of the model"))
            model(*args, **kwargs)
            changed = before != json.dumps(to_json(root.get_extra_state(), "the extra state of the model"))
        if changed:
            raise PlanError(
                f"{type(model).__name__} cannot be cut into stages: its own forward changes its extra state "
                "(get_extra_state). Move that into a module of its own, which stays whole, or use another strategy."
            )
    return stateful


class PipelineAxis(MeshAxis):
    """Pipeline parallelism. See `MeshAxis`.

    Attributes:
        infos: The stages, as JSON-able data.
        pipeline: What runs them, once all axes are applied.
    """

    runs_slices = True

    infos: list[dict[str, Any]]
    pipeline: Pipeline
    _split: partition.Split

    def __init__(self, placements: Placements, before: Sequence[MeshAxis]) -> None:
        super().__init__(placements, before)
        self._tied: list[tuple[Channel, list[str]]] = []
        self._cleanup = contextlib.ExitStack()

    @classmethod
    def propose(cls, task: Task, plan: Plan, example: Example) -> Proposal:
        """See `MeshAxis`. Measured times differ from rank to rank, so the cuts of one rank are those of all."""
        # torch.export's graph has no BatchNorm modules left to synchronize.
        synced = plan.sync_batchnorm and plan.mesh.data > 1 and BatchNorms.layers_of(task.model)
        stateful = check_root_state(task.model, example)
        kinds = partition.KINDS[:1] if synced or stateful else partition.KINDS
        split = partition.split(task.model, *example, plan.stages, at=plan.split_at, kinds=kinds)
        counting = next((effect for effect in split.effects if effect.counts), None)
        if plan.stages > plan.mesh.pp and counting is not None:
            raise PlanError(
                f"forward counts in {counting}, which two stages of a rank would see at different calls: make it a "
                "buffer, or use another schedule than interleaved."
            )
        for name, module in stateful.items():
            if len(of := {stage % plan.mesh.pp for stage in split.stages_of(module)}) > 1:
                raise PlanError(
                    f"{name} has extra state, and is called in stages of {len(of)} ranks, which would each have their "
                    "own: call it once, or cut elsewhere (split_at)."
                )
        ranks = [range(rank, plan.stages, plan.mesh.pp) for rank in range(plan.mesh.pp)]
        shares = [
            {name: float(any(stage in split.holders[name] for stage in stages)) for name in split.holders}
            for stages in ranks
        ]
        # A stage sends what crosses the cut behind it, and back the gradients of what crosses the cut before it.
        crossing = [0, *split.bytes_crossing, 0]
        moved = max(sum(crossing[stage] + crossing[stage + 1] for stage in stages) for stages in ranks)
        return Proposal(split.cuts, AxisCost(shares=shares, moved=moved), split)

    def apply(self, proposal: Proposal, example: Example) -> None:
        """See `MeshAxis`."""
        placements, size = self.placements, self.placements.channels.pp.size
        model, plan, world = placements.task.model, placements.plan, placements.channels.world
        with contextlib.ExitStack() as stack:
            for axis in self.before:
                stack.enter_context(axis.dry_run())
            if self.before:  # they have changed the model
                proposal = agree_on_proposals([type(self)], placements.task, plan, example, world)[0]
            self._split = proposal.made or partition.split(model, *example, plan.stages, cuts=proposal.data)
        # If a rank failed to cut, this collective raises. Without it, ranks would wait for that one when links open.
        world.all_reduce_(torch.zeros(1, device=placements.device))
        self.infos = [asdict(info) for info in self._split.infos]
        for name in placements.layouts:
            placements.record(name, stages=tuple(sorted({stage % size for stage in self._split.holders[name]})))
            if name in placements.table.parameters:
                placements.release(name)

    def stage_parameters(self) -> list[list[str]]:
        """See `MeshAxis`; a parameter that two stages of this rank share is the first one's."""
        placements = self.placements
        found: list[list[str]] = []
        for stage in range(placements.channels.pp.rank, placements.plan.stages, placements.channels.pp.size):
            taken = {name for names in found for name in names}
            holders = self._split.holders
            found.append([n for n in placements.table.parameters if stage in holders[n] and n not in taken])
        return found

    def prepare(self, after: Sequence[MeshAxis]) -> None:
        """See `MeshAxis`."""
        self._tied = self._tied_channels()
        placements, world = self.placements, self.placements.world
        mesh = placements.channels.mesh
        links = world.links(mesh.ring("pp"))
        for link in links.values():
            self._cleanup.callback(link.close)
        stages = range(placements.channels.pp.rank, placements.plan.stages, placements.channels.pp.size)
        elsewhere = {n: b for n, b in self._split.written.items() if not {*stages} & {*self._split.holders[n]}}
        placements.readable.mark_stale(elsewhere)
        line = next(line for line in mesh.groups("pp") if world.rank in line)
        rank = line.index(world.rank)
        self.pipeline = Pipeline(
            placements.task, placements.plan, self._split, rank, links[line[rank - 1]],
            links[line[(rank + 1) % len(line)]], placements.device, placements.precision,
            shards=next((axis.shards for axis in after if axis.shards is not None), None),
            batch_norms=placements.batch_norms, dry_run=self._alone, guarded=placements.readable.guarded,
        )  # fmt: skip

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Context in which this rank traces or times its stage alone."""
        norms, readable = self.placements.batch_norms, self.placements.readable
        with contextlib.ExitStack() as stack:
            for axis in self.before:
                stack.enter_context(axis.dry_run())
            stack.enter_context(contextlib.nullcontext() if norms is None else norms.local_only())
            stack.enter_context(readable.revealed())
            yield

    def _tied_channels(self) -> list[tuple[Channel, list[str]]]:
        """For each set of stages that share a tied parameter: a channel over them, and the parameters' names."""
        channels, table = self.placements.channels, self.placements.table
        shared: dict[tuple[int, ...], list[str]] = {}
        for name, placement in table.placements.items():
            if placement.stages is not None and len(placement.stages) > 1 and name in table.trainable:
                shared.setdefault(placement.stages, []).append(name)
        tied = []
        for stages, names in sorted(shared.items()):
            everywhere = len(stages) == channels.pp.size
            groups = channels.mesh.groups_of("pp", stages)
            channel = channels.pp if everywhere else self.placements.world.channel_within(groups)
            if channel is not channels.world:
                self._cleanup.callback(channel.close)
            if channels.pp.rank in stages:
                tied.append((channel, names))
        return tied

    def begin_step(self) -> None:
        """See `MeshAxis`."""
        self.pipeline.work = []

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T],
        compute: Callable[[Slice, tuple[Any, ...], Callable[[Any, Slice], T]], T],
    ) -> T | None:  # fmt: skip
        """See `MeshAxis`."""
        return self.pipeline.run_forward(action, part, path, function)

    def evaluate(
        self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T],
        compute: Callable[[Slice, tuple[Any, ...], Callable[[Any, Slice], T]], T],
    ) -> T | None:  # fmt: skip
        """See `MeshAxis`."""
        return self.pipeline.forward(part, path, function)

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `MeshAxis`."""
        self.pipeline.run_backward(action, loss, unwanted)

    def sum_gradients(self) -> None:
        """See `MeshAxis`: of tied parameters, over the stages that share them."""
        for channel, names in self._tied:
            for name in names:
                gradient = self.placements.table.parameters[name].grad
                assert gradient is not None
                total = gradient.contiguous()
                channel.all_reduce_(total)
                if total is not gradient:
                    gradient.copy_(total)

    def gather(self) -> None:
        """See `MeshAxis`: the last stage's rank has the values of attributes that are tensors or numbers."""
        channel = self.placements.channels.pp
        source = (self.placements.plan.stages - 1) % channel.size
        modules = dict(self.placements.task.model.named_modules())
        for effect in self._split.effects:
            own = modules[effect.module].__dict__
            packed = partition.pack(own.get(effect.name)) if effect.sendable and channel.rank == source else b""
            packed = channel.broadcast_bytes(packed, source)
            if packed and channel.rank != source:
                own[effect.name] = partition.unpack(packed, self.placements.device)

    def close(self) -> None:
        """See `MeshAxis`."""
        self._cleanup.close()
