"""Replicas of a model hold the same weights and buffers, bit for bit: that is compared by checksums."""

from __future__ import annotations

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placeholder import detached
from nbdist.errors import TaskError

__all__ = ["check_replicas"]


@torch.no_grad()
def check_replicas(table: ParamTable, axes: MeshChannels, step: int, *, buffers: bool = True) -> None:
    """Compare each tensor with the other replicas'. **Collective** over ``dp``.

    Args:
        table: The model's tensors.
        axes: This rank's channels.
        step: The number of steps done.
        buffers: Whether to compare buffers too, which are equal after `average_buffers`.

    Raises:
        TaskError: A tensor differs.
    """
    if axes.dp.size == 1:
        return
    objects = table.objects if buffers else table.parameters
    names = [name for name in objects if name not in table.owners and table.placement(name).held(axes)]
    if not names:
        return
    own = torch.stack([_checksum(detached(objects[name])) for name in names]).to(axes.dp.device)
    for rank, other in enumerate(axes.dp.all_gather(own)):
        if not torch.equal(other, own):
            name = names[int((other != own).any(1).nonzero()[0])]
            raise TaskError(
                f"after step {step} {name} differs between replica {axes.dp.rank} and replica {rank}: something beside "
                "the gradient writes to it on each rank by itself (an optimizer or a hook that draws random numbers, a "
                "step that changes weights). Draw the same numbers on all ranks, or keep what differs in a buffer."
            )


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """``(2,)``: sums over the bits of a tensor, and over those of each second part of it."""
    flat = tensor.contiguous().view(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    return torch.stack([bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)])
