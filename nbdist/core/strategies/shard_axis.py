"""The ``shard`` axis: parameters lie in parts, and are all-gathered block by block while they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nbdist.core.data.reader import copy_batch
from nbdist.core.strategies.mesh_axis import Example, MeshAxis, Proposal
from nbdist.core.strategies.mesh_cost import AxisCost
from nbdist.core.strategies.pipeline.schedules import Action
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.strategies.shard.wrap_policy import blocks_of
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["ShardAxis"]


class ShardAxis(MeshAxis):
    """Full sharding. See `MeshAxis`."""

    runs_slices = True

    @classmethod
    def propose(cls, task: Task, plan: Plan, example: Example) -> Proposal:
        """See `MeshAxis`; in a pipeline each stage is a block."""
        shares = {name: 1 / plan.mesh.shard for name, _ in task.model.named_parameters()}
        if plan.mesh.pp > 1:
            return Proposal([], AxisCost(shares=[shares], together=[list(shares)]))
        blocks = blocks_of(task.model, *copy_batch(example))
        return Proposal(blocks, AxisCost(shares=[shares], together=[names for _, names in blocks]))

    def apply(self, proposal: Proposal, example: Example) -> None:
        """See `MeshAxis`."""
        placements = self.placements
        parameters, readable = placements.table.parameters, placements.readable
        stages = next((names for axis in self.before if (names := axis.stage_parameters()) is not None), None)
        modules: list[nn.Module] = []
        if stages is None:
            modules = [placements.task.model.get_submodule(name) for name, _ in proposal.data]
            stages = [names for _, names in proposal.data]
        for name in parameters:  # those of other stages too: the table is the same on all ranks
            placements.record(name, sharded=True)
        blocks = [[parameters[name] for name in names] for names in stages]
        self.shards = FullySharded(blocks, placements.channels.shard, readable.names, readable.check)
        if modules:
            self.shards.hook(modules)

    def begin_step(self) -> None:
        """See `MeshAxis`."""
        if self.shards is not None:
            self.shards.hide_shards()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """See `MeshAxis`."""
        assert self.shards is not None
        with self.shards.saving():
            yield
        self.shards.expose_shards(summed=True)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """See `MeshAxis`."""
        assert self.shards is not None
        return self.shards.evaluating()

    def settle(self) -> None:
        """See `MeshAxis`."""
        if self.shards is not None:
            self.shards.settle()

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy.run_backward`."""
        assert self.shards is not None
        assert loss is not None
        self.shards.run_backward(loss, unwanted)

    def run_backward_within(self, loss: torch.Tensor, unwanted: bool, retain_graph: bool) -> None:
        """See `MeshAxis`."""
        assert self.shards is not None
        self.shards.run_backward(loss, unwanted, retain_graph=retain_graph)

    def mark_written(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `MeshAxis`."""
        if self.shards is not None:
            self.shards.mark_written(parameters)

    def take_values(self) -> None:
        """See `MeshAxis`."""
        if self.shards is not None:
            self.shards.take_values()

    def used(self) -> set[int]:
        """See `MeshAxis`."""
        return set() if self.shards is None else self.shards.used

    def restore(self) -> None:
        """See `MeshAxis`."""
        if self.shards is not None:
            self.shards.expose_shards()

    def free(self) -> None:
        """See `MeshAxis`."""
        self.close()

    def close(self) -> None:
        """See `MeshAxis`."""
        if self.shards is not None:
            self.shards.close()
