"""Checkpoints: weights and optimizer state in safetensors files, one a rank, and a JSON file that says what is where.

Made on one mesh, a checkpoint is loaded on any other, to the bit: every tensor is read whole, one at a time, and cut
anew. Nothing in it is pickled, so that reading one runs no code.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbdist.core.axes import Axes
from nbdist.core.params import ParamTable
from nbdist.core.placement import Cut, Placement
from nbdist.core.world import World
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh

__all__ = ["check_folder", "load", "load_checkpoint", "save"]

_INDEX = "checkpoint.json"
_FORMAT = 1


def save(folder: str, table: ParamTable, optimizer: torch.optim.Optimizer, axes: Axes) -> None:
    """Write a checkpoint; an older one in the folder is replaced when the new one is whole. **Collective**.

    Args:
        folder: Seen by all ranks; made if it is not there.
        table: The model's tensors.
        optimizer: Over its parameters.
        axes: This rank's channels.

    Raises:
        TaskError: The optimizer keeps something that JSON cannot hold.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    stamp = axes.world.broadcast_bytes(secrets.token_hex(4).encode()).decode()
    name = f"{stamp}-rank{axes.world.rank}.safetensors"
    mine = dict(_pieces(table, optimizer, axes))
    told = [json.loads(text) for text in _from_all(json.dumps([k for k, v in mine.items()]), axes)]
    writer: dict[str, int] = {}
    for rank, keys in enumerate(told):  # of what several ranks hold alike, the first one writes
        for key in keys:
            writer.setdefault(key, rank)
    from safetensors.torch import save_file

    own = {key: tensor for key, tensor in mine.items() if writer[key] == axes.world.rank}
    save_file({key: tensor.detach().contiguous() for key, tensor in own.items()}, path / name)
    values = json.dumps(_values(table, optimizer))
    states = [json.loads(text) for text in _from_all(values, axes)]
    if axes.world.rank == 0:
        index = {
            "format": _FORMAT,
            "mesh": str(axes.mesh),
            "tensors": {name: _described(table.placement(name), axes) for name in table.tensors},
            "files": {key: f"{stamp}-rank{rank}.safetensors" for key, rank in writer.items()},
            "groups": states[0]["groups"],
            "values": {name: value for state in reversed(states) for name, value in state["values"].items()},
        }
        text = path / f"{stamp}.json"
        text.write_text(json.dumps(index, indent=1))
        os.replace(text, path / _INDEX)
        for old in path.glob("*-rank*.safetensors"):
            if not old.name.startswith(stamp):
                old.unlink()
    axes.world.all_reduce_(torch.ones(1, device=axes.world.device))  # nobody goes on before it can be read


def load(folder: str, table: ParamTable, optimizer: torch.optim.Optimizer | None, axes: Axes) -> None:
    """Read a checkpoint into a model and its optimizer, whatever mesh either is on. Every rank reads what it needs.

    Args:
        folder: Where `save` wrote.
        table: The model's tensors, placed.
        optimizer: Over its parameters; None to leave its state be.
        axes: This rank's channels.

    Raises:
        PlanError: There is no checkpoint.
        TaskError: It is another model's.
    """
    check_folder(folder)
    reader = _Reader(Path(folder))
    _check_same_model(reader.index["tensors"], table, folder)
    with torch.no_grad():
        for name, tensor in table.tensors.items():
            placement = table.placement(name)
            if placement.held(axes):
                whole = reader.whole(name, name).to(tensor.device)
                tensor.copy_(whole if name in table.buffers else placement.piece(whole, axes).view_as(tensor))
    if optimizer is not None:
        _load_optimizer(reader, table, optimizer, axes)


def load_checkpoint(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a checkpoint into an ordinary model, in place, whatever mesh it was made on. Local.

    Args:
        folder: Where ``--save`` (or ``save=``) wrote.
        model: The model, with any weights.
        optimizer: Over its parameters, if its state is wanted too.

    Raises:
        PlanError: There is no checkpoint.
        TaskError: It is another model's.
    """
    load(folder, ParamTable.of(model), optimizer, Axes(World(), Mesh()))


def check_folder(folder: str) -> None:
    """Raise `PlanError` where `folder` holds no checkpoint."""
    if not (Path(folder) / _INDEX).is_file():
        raise PlanError(f"{folder!r} holds no checkpoint (no {_INDEX} in it): give the folder that save named.")


def _pieces(table: ParamTable, optimizer: torch.optim.Optimizer, axes: Axes) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank holds: for each tensor its part, under a key that says which one."""
    for name, tensor in table.tensors.items():
        placement = table.placement(name)
        if not placement.held(axes):
            continue
        yield _key(name, "", placement, axes), tensor
        if name in table.parameters and table.is_updated(name, axes):
            for entry, value in optimizer.state.get(table.parameters[name], {}).items():
                if isinstance(value, torch.Tensor):
                    whole = value.shape != tensor.shape
                    part = Placement(layout=placement.layout) if whole else placement
                    yield _key(name, entry, part, axes), value


def _key(name: str, entry: str, placement: Placement, axes: Axes) -> str:
    place = (axes.tp.rank if placement.cut else 0, axes.shard.rank if placement.sharded else 0)
    kind = "part" if placement.cut or placement.sharded else "whole"
    return f"{name}|{entry}|{kind}|{place[0]}|{place[1]}"


def _values(table: ParamTable, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer keeps beside tensors: its groups' settings, and entries of its state."""
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    groups = [
        {key: [names[id(p)] for p in value] if key == "params" else _plain(value, key) for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    values = {
        names[id(parameter)]: {
            key: _plain(value, key) for key, value in state.items() if not isinstance(value, torch.Tensor)
        }
        for parameter, state in optimizer.state.items()
        if id(parameter) in names
    }
    return {"groups": groups, "values": values}


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()  # a learning rate that lives in a tensor
    try:
        json.dumps(value)
    except TypeError:
        raise TaskError(
            f"the optimizer's {key} is a {type(value).__name__}, which a checkpoint cannot hold: it takes numbers, "
            "strings, and lists and dicts of them."
        ) from None
    return value


def _described(placement: Placement, axes: Axes) -> dict[str, Any]:
    cut = placement.cut
    return {
        "shape": list(placement.layout.shape),
        "cut": None if cut is None else {"dim": cut.dim, "sections": list(cut.sections)},
        "tp": axes.tp.size if cut else 1,
        "shard": axes.shard.size if placement.sharded else 1,
    }


def _from_all(text: str, axes: Axes) -> list[str]:
    world = axes.world
    return [world.broadcast_bytes(text.encode(), rank).decode() for rank in range(world.size)]


class _Reader:
    """Reads whole tensors out of a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.index: dict[str, Any] = json.loads((path / _INDEX).read_text())
        if self.index.get("format") != _FORMAT:
            raise PlanError(f"checkpoint {str(path)!r} has format {self.index.get('format')}, this nbdist reads 1.")
        self._open: dict[str, Any] = {}
        self._entries: dict[str, dict[str, bool]] = {}
        for key in self.index["files"]:
            name, entry, kind, *_ = key.rsplit("|", 4)
            self._entries.setdefault(name, {})[entry] = kind == "part"

    def entries(self, name: str) -> list[str]:
        """The tensors of an optimizer's state of a parameter."""
        return [entry for entry in self._entries[name] if entry]

    def whole(self, name: str, source: str, entry: str = "") -> torch.Tensor:
        """A tensor as a whole."""
        about = self.index["tensors"][source]
        if not self._entries[name][entry]:
            return self._tensor(f"{name}|{entry}|whole|0|0")
        shape = list(about["shape"])
        if about["cut"] is not None:
            shape[about["cut"]["dim"]] //= about["tp"]
        local = torch.Size(shape)
        pieces = []
        for tp in range(about["tp"]):
            parts = [self._tensor(f"{name}|{entry}|part|{tp}|{shard}") for shard in range(about["shard"])]
            flat = parts[0] if about["shard"] == 1 else torch.cat(parts)[: local.numel()]
            pieces.append(flat.view(local))
        if about["cut"] is None:
            return pieces[0]
        return Cut(dim=about["cut"]["dim"], sections=tuple(about["cut"]["sections"])).join(pieces)

    def _tensor(self, key: str) -> torch.Tensor:
        from safetensors import safe_open

        file = self.index["files"][key]
        if file not in self._open:
            self._open[file] = safe_open(self._path / file, framework="pt")
        tensor: torch.Tensor = self._open[file].get_tensor(key)
        return tensor


def _check_same_model(tensors: dict[str, Any], table: ParamTable, folder: str) -> None:
    shapes = {name: list(table.placement(name).layout.shape) for name in table.tensors}
    for name in {**shapes, **tensors}:
        there, here = tensors.get(name, {}).get("shape"), shapes.get(name)
        if there != here:
            what = "is not in it" if there is None else "is only in it" if here is None else f"has shape {there} in it"
            raise TaskError(
                f"checkpoint {folder!r} is another model's: {name}{'' if here is None else f' {here}'} {what}."
            )


def _load_optimizer(reader: _Reader, table: ParamTable, optimizer: torch.optim.Optimizer, axes: Axes) -> None:
    groups = reader.index["groups"]
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    mine = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if mine != [group["params"] for group in groups]:
        raise TaskError(
            "the checkpoint's optimizer has other parameter groups than this one: build it as it was, over the same "
            "parameters in the same order."
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if key != "params" and key in group:
                group[key] = tuple(value) if isinstance(group[key], tuple) else value
    for name, parameter in table.parameters.items():
        placement = table.placement(name)
        if not (placement.held(axes) and table.is_updated(name, axes)):
            continue
        state: dict[str, Any] = dict(reader.index["values"].get(name, {}))
        for entry in reader.entries(name):
            whole = reader.whole(name, name, entry)
            if list(whole.shape) == list(placement.layout.shape):
                piece = placement.piece(whole.to(parameter.device), axes).view_as(parameter)
                state[entry] = torch.empty_like(parameter, dtype=whole.dtype).copy_(piece)
            else:
                state[entry] = whole if whole.ndim == 0 else whole.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
