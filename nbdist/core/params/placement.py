"""Placement: which part of a tensor is on which rank of the mesh (cf. DTensor's placements); split and gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nbdist.core.comm.mesh_channels import MeshChannels

__all__ = ["Cut", "Placement", "shard_of"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a tensor is split evenly along one of its dims.

    Args:
        dim: The dim.
        sections: Lengths along `dim` that are split separately: one for most tensors, three for a fused ``qkv``.
    """

    dim: int
    sections: tuple[int, ...]

    def part(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The part of rank `rank` of `size`: a contiguous copy. Local."""
        sections = whole.split(list(self.sections), self.dim)
        return torch.cat([section.chunk(size, self.dim)[rank] for section in sections], self.dim)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from the parts of all ranks. Local."""
        lengths = [section // len(parts) for section in self.sections]
        split = [part.split(lengths, self.dim) for part in parts]
        return torch.cat([slab for section in zip(*split, strict=True) for slab in section], self.dim)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the parts of one tensor are.

    Args:
        layout: The whole tensor on the meta device: its shape, strides and dtype.
        stages: Coordinates on ``pp`` that hold it, each the same; None for all of them.
        cut: How it is split over ``tp``; None if every rank has it whole.
        sharded: Whether it is sharded flat over ``shard``, in parts of equal length, the last ones padded.
    """

    layout: torch.Tensor
    stages: tuple[int, ...] | None = None
    cut: Cut | None = None
    sharded: bool = False

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole tensor."""
        return self.stages is None and self.cut is None and not self.sharded

    def held(self, axes: MeshChannels) -> bool:
        """Whether this rank holds a part."""
        return self.stages is None or axes.pp.rank in self.stages

    def copies(self, axes: MeshChannels) -> int:
        """How many ranks of a replica hold the same part."""
        stages = 1 if axes.pp.size == 1 else axes.pp.size if self.stages is None else len(self.stages)
        return stages * (1 if self.cut else axes.tp.size) * (1 if self.sharded else axes.shard.size)

    def part(self, tensor: torch.Tensor, axes: MeshChannels) -> torch.Tensor:
        """This rank's part of a whole tensor: a copy. Local."""
        if self.cut is not None:
            tensor = self.cut.part(tensor, axes.tp.rank, axes.tp.size)
        return shard_of(tensor, axes.shard.rank, axes.shard.size) if self.sharded else tensor.clone()

    def gather(self, part: torch.Tensor | None, axes: MeshChannels) -> torch.Tensor:
        """The whole tensor, on every rank. **Collective** over the replica; ranks without a part give None.

        `part` may be of any tensor that is split like this one: a parameter, or its optimizer state.
        """
        whole = torch.empty(0)
        if part is not None:
            whole = part.detach().to(axes.world.device)
            if self.sharded:
                shape = self._local_shape(axes)
                whole = torch.cat(axes.shard.all_gather(whole.contiguous()))[: shape.numel()].view(shape)
            if self.cut is not None:
                whole = self.cut.join(axes.tp.all_gather(whole.contiguous()))
        if self.stages is not None and axes.pp.size > 1:
            source = self.stages[0]
            dtype = axes.pp.broadcast_bytes(str(whole.dtype)[6:].encode(), source).decode()
            if part is None:
                whole = torch.empty(self.layout.shape, dtype=getattr(torch, dtype), device=axes.pp.device)
            axes.pp.broadcast_any_(whole, source)
        return whole

    def with_layout(
        self, whole: torch.Tensor, empty_like: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """A copy of the whole tensor, with the original strides; in memory of `empty_like`, if given. Local.

        Fused optimizers iterate over a parameter and its state in memory order, so their strides must be the same.
        """
        if empty_like is not None and whole.dtype == self.layout.dtype:
            return empty_like(self.layout).copy_(whole)
        strides = self.layout.stride()
        result = torch.empty_strided(self.layout.shape, strides, dtype=whole.dtype, device=whole.device)
        return result.copy_(whole)

    def _local_shape(self, axes: MeshChannels) -> torch.Size:
        shape = list(self.layout.shape)
        if self.cut is not None:
            shape[self.cut.dim] //= axes.tp.size
        return torch.Size(shape)


def shard_of(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Shard `rank` of a tensor that is sharded flat into `size` parts of equal length; padded with zeros. Local."""
    flat = tensor.reshape(-1)
    length = -(-flat.numel() // size)
    part = flat.new_zeros(length)
    mine = flat[rank * length : (rank + 1) * length]
    part[: len(mine)] = mine
    return part
