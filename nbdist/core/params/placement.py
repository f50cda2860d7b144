"""Placement: which part of a tensor lies on which rank of the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nbdist.core.comm.mesh_channels import MeshChannels

__all__ = ["Cut", "Placement", "shard_of"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a tensor is split evenly along one of its dims.

    Args:
        dim: Which.
        sections: Lengths along `dim`, each of which is split: one for most tensors, three for a fused ``qkv``.
    """

    dim: int
    sections: tuple[int, ...]

    def piece(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The part of rank `rank` of `size`; contiguous, memory of its own. Local."""
        sections = whole.split(list(self.sections), self.dim)
        return torch.cat([section.chunk(size, self.dim)[rank] for section in sections], self.dim)

    def join(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole again, of the parts of all ranks. Local."""
        lengths = [section // len(pieces) for section in self.sections]
        split = [piece.split(lengths, self.dim) for piece in pieces]
        return torch.cat([part for section in zip(*split, strict=True) for part in section], self.dim)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the parts of one tensor lie.

    Args:
        layout: The whole tensor on the meta device: its shape, strides and dtype.
        stages: Coordinates on ``pp`` that hold it, all of it alike; None for every one.
        cut: How it is split over ``tp``; None where every rank has it whole.
        sharded: Whether it is dealt out flat over ``shard``, in parts of equal length, the last ones padded.
    """

    layout: torch.Tensor
    stages: tuple[int, ...] | None = None
    cut: Cut | None = None
    sharded: bool = False

    @property
    def whole(self) -> bool:
        """Whether every rank has all of it."""
        return self.stages is None and self.cut is None and not self.sharded

    def held(self, axes: MeshChannels) -> bool:
        """Whether this rank holds a part."""
        return self.stages is None or axes.pp.rank in self.stages

    def copies(self, axes: MeshChannels) -> int:
        """How many ranks of a replica hold the same part."""
        stages = 1 if axes.pp.size == 1 else axes.pp.size if self.stages is None else len(self.stages)
        return stages * (1 if self.cut else axes.tp.size) * (1 if self.sharded else axes.shard.size)

    def piece(self, tensor: torch.Tensor, axes: MeshChannels) -> torch.Tensor:
        """This rank's part of a whole tensor, in memory of its own. Local."""
        if self.cut is not None:
            tensor = self.cut.piece(tensor, axes.tp.rank, axes.tp.size)
        return shard_of(tensor, axes.shard.rank, axes.shard.size) if self.sharded else tensor.clone()

    def gather(self, part: torch.Tensor | None, axes: MeshChannels) -> torch.Tensor:
        """The whole tensor of its parts, on every rank. **Collective** over the replica; ranks without one give None.

        `part` may be any tensor that is split as this one is: a parameter, or an optimizer's state of it.
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

    def laid_out(self, whole: torch.Tensor) -> torch.Tensor:
        """The whole tensor in memory of its own, with the strides that it came with. Local.

        Fused optimizers go through a parameter and its state in the order of memory, so they must agree.
        """
        strides = self.layout.stride()
        home = torch.empty_strided(self.layout.shape, strides, dtype=whole.dtype, device=whole.device)
        return home.copy_(whole)

    def _local_shape(self, axes: MeshChannels) -> torch.Size:
        shape = list(self.layout.shape)
        if self.cut is not None:
            shape[self.cut.dim] //= axes.tp.size
        return torch.Size(shape)


def shard_of(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Part `rank` of a tensor that is dealt out flat in `size` parts of equal length; padded with zeros. Local."""
    flat = tensor.reshape(-1)
    length = -(-flat.numel() // size)
    part = flat.new_zeros(length)
    mine = flat[rank * length : (rank + 1) * length]
    part[: len(mine)] = mine
    return part
