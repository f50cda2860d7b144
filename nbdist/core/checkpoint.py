"""Checkpoints: weights and optimizer state in safetensors files, one a rank, and a JSON file that says what is where.

Made on one mesh, a checkpoint is loaded on any other, to the bit: every tensor is read whole, one at a time, and cut
anew. Nothing in it is pickled, so that reading one runs no code.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nbdist.core.axes import Axes
from nbdist.core.channels import Channel
from nbdist.core.optimizer_state import device_of_entry, is_split
from nbdist.core.params import ParamTable
from nbdist.core.placement import Placement
from nbdist.core.saved import INDEX, Saved
from nbdist.core.world import World
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh

__all__ = ["check_resume", "check_state", "load", "load_checkpoint", "prepare", "save"]

_STAMP = "[0-9a-f]" * 8


def prepare(folder: str, optimizer: torch.optim.Optimizer, channel: Channel) -> None:
    """See to it, before a training, that its end can be saved; makes the folder. **Collective** over all ranks.

    Raises:
        PlanError: A rank cannot write there.
        TaskError: The optimizer has a setting that JSON cannot hold.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key != "params":
                _plain(value, key)
    problem = ""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"rank {channel.rank} cannot write to save={folder!r} ({error.strerror}): name another folder."
    for told in _from_all(problem, channel):
        if told:
            raise PlanError(told)


def check_state(table: ParamTable, optimizer: torch.optim.Optimizer) -> None:
    """Raise `TaskError` where an optimizer keeps what `save` cannot hold: known after its first step. Local."""
    for name, parameter in table.parameters.items():
        placement = table.placement(name)
        for entry, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                _plain(value, entry)
            elif (placement.cut or placement.sharded) and value.ndim and not is_split(entry, value, parameter.shape):
                raise TaskError(
                    f"the optimizer's {entry} of {name} has shape {list(value.shape)}, which is not its parameter's: "
                    "on a mesh with tp or shard it cannot be saved; use another optimizer, or dp or pp."
                )


def save(folder: str, table: ParamTable, optimizer: torch.optim.Optimizer, axes: Axes) -> None:
    """Write a checkpoint; an older one in the folder is replaced when the new one is whole. **Collective**.

    Args:
        folder: Seen by all ranks.
        table: The model's tensors.
        optimizer: Over its parameters.
        axes: This rank's channels.

    Raises:
        TaskError: The optimizer keeps something that JSON cannot hold.
    """
    check_state(table, optimizer)
    path, world = Path(folder), axes.world
    stamp = world.broadcast_bytes(secrets.token_hex(4).encode()).decode()
    values = json.dumps(_values(table, optimizer))
    mine = dict(_pieces(table, optimizer, axes))
    writers: dict[str, int] = {}
    for rank, keys in enumerate(_from_all(json.dumps(list(mine)), world)):
        for key in json.loads(keys):
            writers.setdefault(key, rank)  # of what several ranks hold alike, the first one writes
    own = {key: tensor.contiguous() for key, tensor in mine.items() if writers[key] == world.rank}
    save_file(own, path / f"{stamp}-rank{world.rank}.safetensors")
    states = [json.loads(text) for text in _from_all(values, world)]  # when all have told, all have written
    if world.rank == 0:
        index = {
            "format": Saved.FORMAT,
            "mesh": str(axes.mesh),
            "tensors": {name: _described(table.placement(name), axes) for name in table.tensors},
            "files": {key: f"{stamp}-rank{rank}.safetensors" for key, rank in writers.items()},
            "groups": states[0]["groups"],
            "values": {name: value for state in reversed(states) for name, value in state["values"].items()},
        }
        _replace_index(path, stamp, index)
    world.all_reduce_(torch.ones(1, device=world.device))  # nobody goes on before it can be read


def _replace_index(path: Path, stamp: str, index: dict[str, Any]) -> None:
    """Let a new checkpoint take the place of the old one at once, and tidy up after that."""
    text = path / f"{stamp}-index.json"
    text.write_text(json.dumps(index, indent=1))
    os.replace(text, path / INDEX)
    for pattern in (f"{_STAMP}-rank*.safetensors", f"{_STAMP}-index.json"):
        for old in path.glob(pattern):
            if not old.name.startswith(stamp):
                old.unlink()


def load(folder: str, table: ParamTable, optimizer: torch.optim.Optimizer | None, axes: Axes) -> None:
    """Read a checkpoint into a model and its optimizer, whatever mesh either is on. Local.

    Args:
        folder: Where `save` wrote.
        table: The model's tensors, placed.
        optimizer: Over its parameters; None to leave its state be.
        axes: This rank's channels.

    Raises:
        PlanError: There is no checkpoint.
        TaskError: It is another model's or another optimizer's; nothing has been changed.
    """
    saved = Saved(folder)
    _check_same(saved, table, optimizer)
    with torch.no_grad():
        for name, tensor in table.tensors.items():
            placement = table.placement(name)
            if placement.held(axes):
                whole = saved.whole(name).to(tensor.device)
                tensor.copy_(whole if name in table.buffers else placement.piece(whole, axes))
        if optimizer is not None:
            _load_settings(saved, optimizer)
            for name in table.parameters:
                _load_state(saved, name, table, optimizer, axes)


def load_checkpoint(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a checkpoint into an ordinary model, in place, whatever mesh it was made on. Local.

    Args:
        folder: Where ``--save`` (or ``save=``) wrote.
        model: The model, with any weights.
        optimizer: Over its parameters, if its state is wanted too.

    Raises:
        PlanError: There is no checkpoint.
        TaskError: It is another model's or another optimizer's; nothing has been changed.
    """
    load(folder, ParamTable.of(model), optimizer, Axes(World(), Mesh()))


def check_resume(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise what `load` would, of a model that is whole. Local; nothing is changed."""
    _check_same(Saved(folder), ParamTable.of(model), optimizer)


def _pieces(table: ParamTable, optimizer: torch.optim.Optimizer, axes: Axes) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank holds: for each tensor its part, under a key that says which one."""
    for name, tensor in table.tensors.items():
        placement = table.placement(name)
        if not placement.held(axes):
            continue
        # A buffer may be a view of another one, which safetensors refuses.
        yield _key(name, "", placement, axes), tensor.clone() if name in table.buffers else tensor
        if name not in table.parameters or not table.is_updated(name, axes):
            continue
        for entry, value in optimizer.state.get(table.parameters[name], {}).items():
            if isinstance(value, torch.Tensor):
                split = is_split(entry, value, tensor.shape)
                part = placement if split else Placement(layout=placement.layout)
                yield _key(name, entry, part, axes), value.detach()


def _key(name: str, entry: str, placement: Placement, axes: Axes) -> str:
    return Saved.key(
        name,
        entry,
        axes.tp.rank if placement.cut else None,
        axes.shard.rank if placement.sharded else None,
    )


def _values(table: ParamTable, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer keeps beside tensors: its groups' settings, and entries of its state."""
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    groups = [
        {key: [names[id(p)] for p in value] if key == "params" else _plain(value, key) for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in table.parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                values.setdefault(name, {})[entry] = _plain(value, entry)
    return {"groups": groups, "values": values}


def _plain(value: Any, name: str) -> Any:
    """A value as JSON gives it back, but for tuples, which become lists.

    Raises:
        TaskError: It would come back as something else.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()  # a learning rate that lives in a tensor
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, name) for key, item in value.items()}
    raise TaskError(
        f"the optimizer's {name} is a {type(value).__name__}, which a checkpoint cannot hold: it takes numbers, "
        "strings, and lists and dicts of them."
    )


def _described(placement: Placement, axes: Axes) -> dict[str, Any]:
    cut = placement.cut
    return {
        "shape": list(placement.layout.shape),
        "dtype": str(placement.layout.dtype)[6:],
        "cut": None if cut is None else {"dim": cut.dim, "sections": list(cut.sections)},
        "tp": axes.tp.size if cut else 1,
        "shard": axes.shard.size if placement.sharded else 1,
    }


def _from_all(text: str, channel: Channel) -> list[str]:
    return [channel.broadcast_bytes(text.encode(), rank).decode() for rank in range(channel.size)]


def _check_same(saved: Saved, table: ParamTable, optimizer: torch.optim.Optimizer | None) -> None:
    shapes = {name: list(table.placement(name).layout.shape) for name in table.tensors}
    for name in {**shapes, **saved.tensors}:
        there, here = saved.tensors.get(name, {}).get("shape"), shapes.get(name)
        if there != here:
            what = "is not in it" if there is None else "is only in it" if here is None else f"has shape {there} in it"
            raise TaskError(
                f"checkpoint {saved.folder!r} is another model's: {name}{'' if here is None else f' {here}'} {what}; "
                "make the model as it was."
            )
    if optimizer is None:
        return
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    mine = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if mine != [group["params"] for group in saved.groups]:
        raise TaskError(
            f"checkpoint {saved.folder!r} has other parameter groups than the optimizer: build it as it was, over the "
            "same parameters in the same order."
        )


def _load_settings(saved: Saved, optimizer: torch.optim.Optimizer) -> None:
    for group, values in zip(optimizer.param_groups, saved.groups, strict=True):
        for key, value in values.items():
            if key == "params" or key not in group:
                continue
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value


def _load_state(saved: Saved, name: str, table: ParamTable, optimizer: torch.optim.Optimizer, axes: Axes) -> None:
    parameter, placement = table.parameters[name], table.placement(name)
    optimizer.state.pop(parameter, None)
    if not (placement.held(axes) and table.is_updated(name, axes)):
        return
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    state: dict[str, Any] = dict(saved.values.get(name, {}))
    for entry in saved.entries(name):
        whole = saved.whole(name, entry)
        if is_split(entry, whole, placement.layout.shape):
            piece = placement.piece(whole.to(parameter.device), axes)
            dtype = parameter.dtype if whole.dtype == saved.dtype(name) else whole.dtype
            state[entry] = torch.empty_like(parameter, dtype=dtype).copy_(piece)
        else:  # not the file's memory, which would keep it mapped
            state[entry] = whole.to(device_of_entry(entry, group, parameter.device), copy=True)
    if state:
        optimizer.state[parameter] = state
