"""Optimizer state on a mesh: sharded like its parameters, gathered at the end."""

from __future__ import annotations

import json
from typing import Any

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.json_value import plain
from nbdist.core.params.param_table import ParamTable
from nbdist.errors import TaskError

__all__ = ["cut_state_", "device_of_entry", "entry_to_json", "gather_state_", "is_split", "move_state_"]

_COUNTERS = {
    "step",
    "mu_product",
    "eta",
    "mu",
}  # of torch.optim: one per parameter, also of a scalar


def is_split(entry: str, value: Any, shape: torch.Size) -> bool:
    """Whether a state entry has a value for each element of a parameter of `shape`, and so is sharded like it."""
    return isinstance(value, torch.Tensor) and value.shape == shape and entry not in _COUNTERS


def entry_to_json(entry: Any, value: Any) -> Any:
    """A state entry as JSON-able data, to be sent to another rank. Local.

    Raises:
        TaskError: JSON cannot represent it.
    """
    if not isinstance(entry, str):
        raise TaskError(
            f"the optimizer keeps a state under {entry!r}: name it by a string, so that it can be gathered."
        )
    return plain(value.tolist() if isinstance(value, torch.Tensor) else value, f"the optimizer's {entry}")


def device_of_entry(entry: str, group: dict[str, Any], device: torch.device) -> torch.device:
    """The device of a state entry of a parameter on `device`: as in torch, step counters are mostly on the CPU."""
    if entry == "step" and not (group.get("fused") or group.get("capturable")):
        return torch.device("cpu")
    return device


def move_state_(optimizer: torch.optim.Optimizer) -> None:
    """Move each parameter's state to the parameter's device, without a cast. Local."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: dict[str, Any] = optimizer.state.get(parameter) or {}
            for entry, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[entry] = value.to(device_of_entry(entry, group, parameter.device))


@torch.no_grad()
def cut_state_(optimizer: torch.optim.Optimizer, table: ParamTable, axes: MeshChannels) -> None:
    """Keep this rank's parts of a state that was made for whole parameters. Local."""
    for name, placement in table.placements.items():
        state = optimizer.state.get(table.parameters[name]) if name in table.parameters else None
        if not state:
            continue
        if not placement.held(axes):
            del optimizer.state[table.parameters[name]]
            continue
        for entry, value in state.items():
            if is_split(entry, value, placement.layout.shape):
                state[entry] = placement.part(value, axes)


@torch.no_grad()
def gather_state_(optimizer: torch.optim.Optimizer, table: ParamTable, axes: MeshChannels, *, keep: bool) -> None:
    """Gather the state, on ranks with `keep`; call it before the parameters are gathered. **Collective**: the replica.

    Raises:
        TaskError: An entry cannot be sent to another rank.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, placement in table.placements.items():
        parameter = table.parameters.get(name)
        if parameter is None or id(parameter) not in groups:
            continue
        state: dict[str, Any] = dict(optimizer.state.get(parameter, {})) if placement.held(axes) else {}
        source = 0 if placement.stages is None else placement.stages[0]
        split = {entry: is_split(entry, v, parameter.shape) for entry, v in state.items()}
        others = {entry: entry_to_json(entry, v) for entry, v in state.items() if not split[entry]}
        tensors = {entry: str(v.dtype)[6:] for entry, v in state.items() if isinstance(v, torch.Tensor)}
        data = json.dumps([split, others, tensors]).encode()
        split, others, tensors = json.loads(axes.pp.broadcast_bytes(data, source))
        whole: dict[str, Any] = {}
        for entry, is_part in split.items():
            if is_part:
                whole[entry] = placement.with_layout(placement.gather(state.get(entry), axes))
            elif entry in tensors:
                device = device_of_entry(entry, groups[id(parameter)], axes.world.device)
                whole[entry] = torch.tensor(others[entry], dtype=getattr(torch, tensors[entry]), device=device)
            else:
                whole[entry] = others[entry]
        if whole and keep:
            optimizer.state[parameter] = whole
