"""What a mesh costs a rank, in memory and traffic, computed from what its axes would do to a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from nbdist.core.optim.shardability import state_numbers
from nbdist.plan import Plan

__all__ = ["AxisCost", "MeshCost", "cost_of"]


@dataclass(frozen=True, kw_only=True)
class AxisCost:
    """What one axis does to a rank's memory and traffic.

    Args:
        shares: For each coordinate on the axis, which share of a parameter a rank there holds, by name: all if a name
            is missing. One entry stands for all coordinates.
        together: Parameters of each block that is gathered at a time.
        moved: Bytes of activations that pass through the axis for one slice, on the rank with the most.
    """

    shares: Sequence[Mapping[str, float]] = ({},)
    together: Sequence[Sequence[str]] = ()
    moved: int = 0


@dataclass(frozen=True, kw_only=True)
class MeshCost:
    """What a mesh costs the rank that holds the most.

    Args:
        memory: Bytes it holds all the time: parts of parameters, their gradients and optimizer state.
        gathered: Bytes of the largest block that is gathered at a time, with its gradient.
        moved: For each axis that communicates, bytes of the tensors that a rank sums, gathers, scatters or sends along
            it in a full step. How many of them cross a link depends on the collective: an all-reduce over n ranks in a
            ring sends 2 (n - 1) / n times its tensor.
    """

    memory: int
    gathered: int = 0
    moved: dict[str, int] = field(default_factory=dict)


def cost_of(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], plan: Plan, axes: Mapping[str, AxisCost]
) -> MeshCost:
    """Add up what axes cost. Local.

    Args:
        model: The whole model.
        optimizers: Over its parameters; their state is that of one small trial step.
        plan: What would be run.
        axes: Of the axes that change the model.
    """
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    with_state = [
        (state_numbers(optimizer), [names[id(p)] for group in optimizer.param_groups for p in group["params"]])
        for optimizer in optimizers
    ]
    copies = (plan.ema is not None) + bool(plan.keep_best)
    slices = -(-plan.slices // plan.mesh.data)

    def share(name: str, coordinate: int, but: str = "") -> float:
        held = [axis.shares[coordinate % len(axis.shares)].get(name, 1.0) for at, axis in axes.items() if at != but]
        return math.prod(held)

    def nbytes(names: Sequence[str], coordinate: int, but: str = "", trainable: bool = False) -> int:
        chosen = [name for name in names if parameters[name].requires_grad or not trainable]
        return round(sum(parameters[name].nbytes * share(name, coordinate, but) for name in chosen))

    memory, gathered, moved = [], [0], dict[str, int]()
    every = tuple(parameters)
    coordinates = range(max((len(axis.shares) for axis in axes.values()), default=1))
    for coordinate in coordinates:
        state = sum(numbers * nbytes(own, coordinate, trainable=True) for numbers, own in with_state)
        copied = nbytes(every, coordinate, trainable=True)  # gradients, and copies of the weights
        memory.append(nbytes(every, coordinate) + copied * (1 + copies) + round(state))
        blocks = [names for axis in axes.values() for names in axis.together]
        gathered += [
            nbytes(names, coordinate, "shard") + nbytes(names, coordinate, "shard", trainable=True) for names in blocks
        ]
    if plan.mesh.dp > 1:
        moved["dp"] = max(nbytes(every, coordinate, trainable=True) for coordinate in coordinates)
    if plan.mesh.shard > 1:  # gathered for forward and for backward, then the gradients are scattered
        moved["shard"] = slices * max(
            2 * nbytes(every, coordinate, "shard") + nbytes(every, coordinate, "shard", trainable=True)
            for coordinate in coordinates
        )
    moved |= {name: slices * axis.moved for name, axis in axes.items() if axis.moved}
    return MeshCost(memory=max(memory), gathered=max(gathered), moved=moved)
