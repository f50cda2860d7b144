"""`nbdist.unshard`: makes a model whole on rank 0 after training with ``gather=False`` has left it sharded."""

from __future__ import annotations

import weakref

from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placement import Placement
from nbdist.errors import TaskError
from nbdist.plan import Mesh

__all__ = ["check_whole", "record_placements", "unshard"]

_parts: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, Placement], Mesh]] = weakref.WeakKeyDictionary()
"""Where the parts of a sharded model lie; emptied, but not removed, when rank 0 has gathered it."""


def record_placements(model: nn.Module, placements: dict[str, Placement], mesh: Mesh, prefix: str = "") -> None:
    """Record where the parts of a model lie, for `unshard`; their names in `placements` have a prefix. Local."""
    own = {name.removeprefix(prefix): part for name, part in placements.items() if name.startswith(prefix)}
    if own:
        _parts[model] = own, mesh


def check_whole(model: nn.Module) -> None:
    """Raise `TaskError` if this rank has only parts of the model."""
    if _parts.get(model, ({}, None))[0]:
        raise TaskError(
            "the model is sharded, because it was trained with gather=False: create it again, and give the "
            "checkpoint's folder as resume."
        )


def unshard(model: nn.Module, *, device: str = "auto") -> nn.Module:
    """Gather a model that ``nbdist.train(..., gather=False)`` has left sharded: on rank 0, in place.

    **Collective** over the ranks it was trained on. The other ranks take part for one tensor at a time, and their model
    stays sharded. So does the optimizer's state: use `checkpoint` to save it.

    Args:
        model: The model; a whole one is returned unchanged.
        device: As in `train`.

    Raises:
        TaskError: The number of ranks is not that of the mesh it was trained on.
    """
    if model not in _parts:
        return model
    placements, mesh = _parts[model]
    before = next(model.parameters()).device
    with World.from_environment(device) as world:
        if world.size != mesh.size:
            raise TaskError(f"the model is sharded on mesh {mesh}, but there are {world.size} ranks: start as many.")
        if not world.channel().broadcast_bytes(b"sharded" if placements else b""):
            return model  # rank 0 has gathered it already, and may have trained it since
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
