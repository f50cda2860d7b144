"""The ``shard`` axis: parameters lie in parts, and are all-gathered block by block while they compute."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import torch
from torch import nn

from nbdist.core.strategies.mesh_axis import Example, MeshAxis
from nbdist.core.strategies.pipeline.schedules import Action
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.core.strategies.shard.wrap_policy import blocks_of

__all__ = ["ShardAxis"]


class ShardAxis(MeshAxis):
    """Full sharding. See `MeshAxis`."""

    runs_slices = True

    def apply(self, example: Example) -> None:
        """See `MeshAxis`."""
        placements = self.placements
        parameters, readable = placements.table.parameters, placements.readable
        stages = next((names for axis in self.before if (names := axis.stage_parameters()) is not None), None)
        modules: list[nn.Module] = []
        if stages is None:
            local = json.dumps(blocks_of(placements.task.model, *example)).encode()
            chosen = json.loads(placements.channels.world.broadcast_bytes(local))  # a forward may branch by rank
            modules = [placements.task.model.get_submodule(name) for name, _ in chosen]
            stages = [names for _, names in chosen]
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

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `MeshAxis`."""
        assert self.shards is not None
        self.shards.hide_shards()
        try:
            yield
        finally:
            self.shards.expose_shards()

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """See `Strategy.run_backward`."""
        assert self.shards is not None
        assert loss is not None
        self.shards.run_backward(loss, unwanted)

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
