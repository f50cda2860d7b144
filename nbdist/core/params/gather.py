"""Models that a training has left in parts, and how they become whole."""

from __future__ import annotations

import weakref

from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.params.placement import Placement
from nbdist.core.params.table import ParamTable
from nbdist.errors import TaskError
from nbdist.plan import Mesh

__all__ = ["check_whole", "gather", "leave_in_parts"]

_parts: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, Placement], Mesh]] = weakref.WeakKeyDictionary()
"""Where the parts of a model lie: nowhere on rank 0 once it has gathered them, but it is still asked to."""


def leave_in_parts(model: nn.Module, placements: dict[str, Placement], mesh: Mesh) -> None:
    """Remember where the parts of a model lie. Local."""
    if placements:
        _parts[model] = placements, mesh


def check_whole(model: nn.Module) -> None:
    """Raise `TaskError` where only parts of a model are here."""
    if _parts.get(model, ({}, None))[0]:
        raise TaskError(
            "the model lies in parts since it was trained with gather=False: make it anew, and give the checkpoint's "
            "folder as resume."
        )


def gather(model: nn.Module, *, device: str = "auto") -> nn.Module:
    """Make a model whole that ``nbdist.train(..., gather=False)`` has left in parts: on rank 0, in place.

    **Collective** over the ranks it was trained on. One tensor at a time passes through the other ranks, whose model
    stays in parts. The optimizer's state stays in parts too: `checkpoint` is what keeps it.

    Args:
        model: The model; a whole one is returned as it is.
        device: As in `train`.

    Raises:
        TaskError: The mesh it was trained on needs other ranks than there are.
    """
    if model not in _parts:
        return model
    placements, mesh = _parts[model]
    before = next(model.parameters()).device
    with World.from_environment(device) as world:
        if world.size != mesh.size:
            raise TaskError(f"the model lies in parts on mesh {mesh}, but there are {world.size} ranks: start as many.")
        if not world.channel().broadcast_bytes(b"in parts" if placements else b""):
            return model  # rank 0 has it, perhaps trained on
        axes = MeshChannels(world, mesh)
        table = ParamTable.of(model)
        table.placements.update(placements)
        try:
            table.gather_(axes, keep=world.rank == 0)
        finally:
            axes.close()
    if not table.placements:
        placements.clear()
        model.to(before)
    return model
