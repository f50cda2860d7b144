"""Models that a training has left in parts, and how they become whole."""

from __future__ import annotations

import weakref

from torch import nn

from nbdist.core.axes import Axes
from nbdist.core.params import ParamTable
from nbdist.core.world import World
from nbdist.errors import TaskError
from nbdist.plan import Mesh

__all__ = ["gather", "leave_in_parts"]

_parts: weakref.WeakKeyDictionary[nn.Module, tuple[ParamTable, Mesh]] = weakref.WeakKeyDictionary()


def leave_in_parts(model: nn.Module, table: ParamTable, mesh: Mesh) -> None:
    """Remember where the parts of a model lie. Local."""
    if table.placements:
        _parts[model] = table, mesh


def gather(model: nn.Module, *, device: str = "auto") -> nn.Module:
    """Make a model whole that ``nbdist.train(..., gather=False)`` has left in parts: on rank 0, in place.

    **Collective** over the ranks it was trained on. One tensor at a time passes through the other ranks, whose model
    stays in parts, and can be gathered again.

    Args:
        model: The model; a whole one is returned as it is.
        device: As in `train`.

    Raises:
        TaskError: The mesh it was trained on needs other ranks than there are.
    """
    if model not in _parts:
        return model
    table, mesh = _parts[model]
    with World.from_environment(device) as world:
        if world.size != mesh.size:
            raise TaskError(f"the model lies in parts on mesh {mesh}, but there are {world.size} ranks: start as many.")
        axes = Axes(world, mesh)
        try:
            table.gather_(axes, keep=world.rank == 0)
        finally:
            axes.close()
    return model
