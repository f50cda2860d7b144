"""An optimizer's state on a mesh: cut as its parameters are, and whole again at the end."""

from __future__ import annotations

import json
from typing import Any

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.json_value import plain
from nbdist.core.params.table import ParamTable
from nbdist.errors import TaskError

__all__ = ["cut_state_", "device_of_entry", "gather_state_", "is_split", "move_state_", "told_entry"]

_COUNTERS = {"step", "mu_product", "eta", "mu"}  # of torch.optim: one number a parameter, of whatever shape that is


def is_split(entry: str, value: Any, shape: torch.Size) -> bool:
    """Whether an entry of the state of a parameter of `shape` has a value for each element, and is cut as it is."""
    return isinstance(value, torch.Tensor) and value.shape == shape and entry not in _COUNTERS


def told_entry(entry: Any, value: Any) -> Any:
    """An entry of a state as one rank tells it to another, as JSON-able data. Local.

    Raises:
        TaskError: It would arrive as something else.
    """
    if not isinstance(entry, str):
        raise TaskError(f"the optimizer keeps a state under {entry!r}: name it by a word, to have it brought together.")
    return plain(value.tolist() if isinstance(value, torch.Tensor) else value, f"the optimizer's {entry}")


def device_of_entry(entry: str, group: dict[str, Any], device: torch.device) -> torch.device:
    """Where an entry of the state of a parameter on `device` belongs: as torch has it, steps mostly on the CPU."""
    if entry == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return device


def move_state_(optimizer: torch.optim.Optimizer) -> None:
    """Put the state of each parameter on the device where that is, and do not cast it. Local."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: dict[str, Any] = optimizer.state.get(parameter) or {}
            for entry, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[entry] = value.to(device_of_entry(entry, group, parameter.device))


@torch.no_grad()
def cut_state_(optimizer: torch.optim.Optimizer, table: ParamTable, axes: MeshChannels) -> None:
    """Keep this rank's parts of a state that was made with whole parameters. Local."""
    for name, placement in table.placements.items():
        state = optimizer.state.get(table.parameters[name]) if name in table.parameters else None
        if not state:
            continue
        if not placement.held(axes):
            del optimizer.state[table.parameters[name]]
            continue
        for entry, value in state.items():
            if is_split(entry, value, placement.layout.shape):
                state[entry] = placement.piece(value, axes)


@torch.no_grad()
def gather_state_(optimizer: torch.optim.Optimizer, table: ParamTable, axes: MeshChannels, *, keep: bool) -> None:
    """Make the state whole again, where `keep` says so; before the parameters are. **Collective** over the replica.

    Raises:
        TaskError: There is something in it that a rank cannot tell another.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, placement in table.placements.items():
        if name not in table.parameters:
            continue
        parameter = table.parameters[name]
        state: dict[str, Any] = dict(optimizer.state.get(parameter, {})) if placement.held(axes) else {}
        source = 0 if placement.stages is None else placement.stages[0]
        split = {entry: is_split(entry, v, parameter.shape) for entry, v in state.items()}
        others = {entry: told_entry(entry, v) for entry, v in state.items() if not split[entry]}
        tensors = {entry: str(v.dtype)[6:] for entry, v in state.items() if isinstance(v, torch.Tensor)}
        told = json.dumps([split, others, tensors]).encode()
        split, others, tensors = json.loads(axes.pp.broadcast_bytes(told, source))
        whole: dict[str, Any] = {}
        for entry, is_part in split.items():
            if is_part:
                whole[entry] = placement.laid_out(placement.gather(state.get(entry), axes))
            elif entry in tensors:
                device = device_of_entry(entry, groups[id(parameter)], axes.world.device)
                whole[entry] = torch.tensor(others[entry], dtype=getattr(torch, tensors[entry]), device=device)
            else:
                whole[entry] = others[entry]
        if whole and keep:
            optimizer.state[parameter] = whole
