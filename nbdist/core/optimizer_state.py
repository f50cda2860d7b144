"""An optimizer's state on a mesh: cut as its parameters are, and whole again at the end."""

from __future__ import annotations

import json
from typing import Any

import torch

from nbdist.core.axes import Axes
from nbdist.core.params import ParamTable

__all__ = ["cut_state_", "gather_state_"]


@torch.no_grad()
def cut_state_(optimizer: torch.optim.Optimizer, table: ParamTable, axes: Axes) -> None:
    """Keep this rank's parts of a state that was made with whole parameters. Local."""
    for name, placement in table.placements.items():
        state = optimizer.state.get(table.parameters[name]) if name in table.parameters else None
        if not state:
            continue
        if not placement.held(axes):
            del optimizer.state[table.parameters[name]]
            continue
        for entry, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == placement.layout.shape and value.ndim:
                state[entry] = placement.piece(value, axes)


@torch.no_grad()
def gather_state_(optimizer: torch.optim.Optimizer, table: ParamTable, axes: Axes, *, keep: bool) -> None:
    """Make the state whole again, where `keep` says so; before the parameters are. **Collective** over the replica."""
    for name, placement in table.placements.items():
        if name not in table.parameters:
            continue
        parameter = table.parameters[name]
        held = placement.held(axes)
        state: dict[str, Any] = dict(optimizer.state.get(parameter, {})) if held else {}
        source = 0 if placement.stages is None else placement.stages[0]
        split = {entry: isinstance(v, torch.Tensor) and v.shape == parameter.shape for entry, v in state.items()}
        plain = {
            entry: v.tolist() if isinstance(v, torch.Tensor) else v for entry, v in state.items() if not split[entry]
        }
        tensors = {entry: str(v.dtype)[6:] for entry, v in state.items() if isinstance(v, torch.Tensor)}
        told = json.dumps([split, plain, tensors]).encode()
        split, plain, tensors = json.loads(axes.pp.broadcast_bytes(told, source))
        whole: dict[str, Any] = {}
        for entry, is_split in split.items():
            if is_split:
                whole[entry] = placement.gather(state.get(entry), axes)
            elif entry in tensors:
                device = parameter.device if entry != "step" else torch.device("cpu")
                whole[entry] = torch.tensor(plain[entry], dtype=getattr(torch, tensors[entry]), device=device)
            else:
                whole[entry] = plain[entry]
        if whole and keep:
            optimizer.state[parameter] = whole
