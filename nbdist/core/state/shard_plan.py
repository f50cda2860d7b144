"""The pieces of a training that one rank keeps for all: which tensors, under which keys, and what is said of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.attributes import OwnAttributes
from nbdist.core.optim.json_value import plain
from nbdist.core.optim.references import TensorReferences
from nbdist.core.optim.state import is_split
from nbdist.core.params.data_watch import DataWatch
from nbdist.core.params.placement import Placement
from nbdist.core.params.table import ParamTable
from nbdist.errors import TaskError

__all__ = ["SMALL_BYTES", "ShardPlan", "check_state", "from_all", "key_of", "own_entry"]

SMALL_BYTES = 1 << 16
"""Buffers up to this are taken to change in every step: BatchNorm writes its own without telling torch."""

_TRACED = 16
"""So many values of a frozen parameter tell whether it moves."""


class ShardPlan:
    """What this rank keeps. **Collective** over the world: what several ranks hold alike, one of them keeps.

    Args:
        model: Its buffers are looked up anew each time, for a forward may put others in their place.
        table: The model's tensors, placed.
        optimizer: Over its parameters.
        axes: This rank's channels.
        changed: The buffers and frozen parameters that are not as the task, or the checkpoint that it goes on from,
            brought them.
    """

    def __init__(
        self, model: nn.Module, table: ParamTable, optimizer: torch.optim.Optimizer, axes: MeshChannels,
        changed: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._model = model
        self._table = table
        self._optimizer = optimizer
        self._axes = axes
        mine: dict[str, tuple[str, int]] = {
            name: (_key(name, "", table.placement(name), axes), tensor.nbytes)
            for name, tensor in table.parameters.items()
            if table.placement(name).held(axes) and (not tensor.requires_grad or table.is_updated(name, axes))
        }
        told = [json.loads(text) for text in from_all(json.dumps(list(mine.values())), axes.world)]
        keepers = _keepers(told)
        self._kept = [name for name, (key, _) in mine.items() if keepers[key] == axes.world.rank]
        self._versions = {name: buffer._version for name, buffer in self._buffers() if name not in changed}
        self._frozen = [name for name in self._kept if not table.parameters[name].requires_grad]
        self._moved = any(name in changed for name in self._frozen)
        self._taken: set[int] = set()  # the places of frozen parameters whose data somebody has taken
        self._at_first = self._traces()
        # Under shard a write through data is refused, and between steps there are parts only.
        watched = {} if axes.shard.size > 1 else {i: table.parameters[name] for i, name in enumerate(self._frozen)}
        self._watch = DataWatch(watched.values(), self._take)
        self._references = TensorReferences(table.objects)
        self._attributes = OwnAttributes(optimizer, self._references)
        self.described = {name: _described(table.placement(name), axes) for name in table.tensors}

    def changing(self, *, buffers: bool = False) -> dict[str, torch.Tensor]:
        """What steps change: trainable parameters, the optimizer's state, buffers, and what else they did. Local.

        Args:
            buffers: Whether to give the large buffers too that have not changed since the start.
        """
        table, axes = self._table, self._axes
        moved = self.moved()
        pieces = {}
        for name in self._kept:
            parameter, placement = table.parameters[name], table.placement(name)
            if not (parameter.requires_grad or moved):
                continue
            pieces[_key(name, "", placement, axes)] = parameter.detach()
            for entry, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    split = is_split(entry, value, parameter.shape)
                    part = placement if split else Placement(layout=placement.layout)
                    pieces[_key(name, entry, part, axes)] = value.detach()
        for name, buffer in self._buffers():
            changes = buffer.nbytes <= SMALL_BYTES or buffer._version != self._versions.get(name)
            if changes or (buffers and axes.data.rank == 0):
                pieces[_key(name, own_entry(axes.data.rank), table.placement(name), axes)] = buffer.detach()
        return pieces

    def frozen(self) -> dict[str, torch.Tensor]:
        """The parameters that no step changes. Local."""
        table = self._table
        return {
            _key(name, "", table.placement(name), self._axes): table.parameters[name].detach()
            for name in (() if self._moved else self._frozen)
        }

    def moved(self) -> bool:
        """Whether steps change parameters that take no gradient: a teacher, say, which follows the weights. Local.

        What moves is kept with all that does, and where some of it does, all of it is taken to.
        """
        self._moved = self._moved or self._traces() != self._at_first
        return self._moved

    def _traces(self) -> list[Any]:
        """Something of each frozen parameter that is another thing when it has been written to.

        A teacher is mostly written to through ``.data``, which torch does not count: of what is taken so, all values
        are looked at, and of the rest some, for it may have been taken before.
        """
        parameters = [self._table.parameters[name].detach() for name in self._frozen]
        traces: list[Any] = [
            (parameter._version, _digest(parameter) if i in self._taken else b"")
            for i, parameter in enumerate(parameters)
        ]
        for device in {parameter.device for parameter in parameters}:
            some = [
                parameter.reshape(-1)[:: -(-parameter.numel() // _TRACED) or 1].contiguous().view(torch.uint8)
                for parameter in parameters
                if parameter.device == device
            ]
            traces.append(torch.cat(some).cpu().numpy().tobytes())
        return traces

    def _take(self, i: int) -> None:
        """Somebody is about to have the data of a frozen parameter: from here on its values are looked at."""
        if i not in self._taken and not self._moved:
            self._taken.add(i)
            self._at_first[i] = self._at_first[i][0], _digest(self._table.parameters[self._frozen[i]].detach())

    def close(self) -> None:
        """Watch no longer. Local, twice is fine."""
        self._watch.close()

    def values(self) -> dict[str, Any]:
        """What the optimizer keeps beside tensors, as JSON-able data. Local.

        Raises:
            TaskError: It keeps something else.
        """
        return {**_values(self._table, self._optimizer, self._references), "attributes": self._attributes.state_dict()}

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers to keep on this rank: of ranks that read the same data, one does."""
        if self._axes.tp.rank:
            return
        for name, buffer in self._model.named_buffers(remove_duplicate=False):  # the table has each one once
            if name in self._table.buffers and self._table.placement(name).held(self._axes):
                yield name, buffer


def _digest(parameter: torch.Tensor) -> bytes:
    """Its values in few bytes. Waits for the device."""
    flat = parameter.reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()


def own_entry(data_rank: int) -> str:
    """The entry under which the rank at this coordinate of the data keeps a buffer: statistics differ by rank."""
    return f"@{data_rank}" if data_rank else ""


def check_state(table: ParamTable, optimizer: torch.optim.Optimizer) -> None:
    """Raise `TaskError` where an optimizer keeps what cannot be kept: known after its first step. Local."""
    for name, parameter in table.parameters.items():
        placement = table.placement(name)
        for entry, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(entry, str) or "|" in entry or entry.startswith("@"):
                raise TaskError(f"the optimizer keeps a state under {entry!r}: name it by a word, to have it kept.")
            if not isinstance(value, torch.Tensor):
                plain(value, f"the optimizer's {entry}")
            elif (placement.cut or placement.sharded) and value.ndim and not is_split(entry, value, parameter.shape):
                raise TaskError(
                    f"the optimizer's {entry} of {name} has shape {list(value.shape)}, which is not its parameter's: "
                    "on a mesh with tp or shard it cannot be saved; use another optimizer, or dp or pp."
                )


def key_of(name: str, entry: str, tp: int | None, shard: int | None) -> str:
    """What a piece is called: of which tensor, of which entry of its optimizer state, and which part.

    Args:
        name: The parameter or buffer.
        entry: The entry, or empty for the tensor itself.
        tp: The coordinate on ``tp`` where the tensor is cut over it.
        shard: The same for ``shard``.
    """
    kind = "whole" if tp is None and shard is None else "part"
    return f"{name}|{entry}|{kind}|{tp or 0}|{shard or 0}"


def _key(name: str, entry: str, placement: Placement, axes: MeshChannels) -> str:
    return key_of(
        name,
        entry,
        axes.tp.rank if placement.cut else None,
        axes.shard.rank if placement.sharded else None,
    )


def _keepers(told: list[list[tuple[str, int]]]) -> dict[str, int]:
    """Of each key the rank that keeps it, so that all keep about as much: the largest first, by whom keeps least."""
    holders: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for rank, pieces in enumerate(told):
        for key, nbytes in pieces:
            holders.setdefault(key, []).append(rank)
            sizes[key] = nbytes
    loads = [0] * len(told)
    keepers = {}
    for key in sorted(holders, key=lambda key: (len(holders[key]), -sizes[key])):
        keepers[key] = min(holders[key], key=loads.__getitem__)
        loads[keepers[key]] += sizes[key]
    return keepers


def _values(table: ParamTable, optimizer: torch.optim.Optimizer, references: TensorReferences) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    groups = [
        {
            key: [names[id(p)] for p in value]
            if key == "params"
            else references.to_json(value, f"the optimizer's {key}")
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in table.parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                values.setdefault(name, {})[entry] = plain(value, f"the optimizer's {entry}")
    return {"groups": groups, "values": values}


def _described(placement: Placement, axes: MeshChannels) -> dict[str, Any]:
    cut = placement.cut
    return {
        "shape": list(placement.layout.shape),
        "dtype": str(placement.layout.dtype)[6:],
        "cut": None if cut is None else {"dim": cut.dim, "sections": list(cut.sections)},
        "tp": axes.tp.size if cut else 1,
        "shard": axes.shard.size if placement.sharded else 1,
    }


def from_all(text: str, channel: Channel) -> list[str]:
    """The texts of all ranks, in their order. **Collective**."""
    return [channel.broadcast_bytes(text.encode(), rank).decode() for rank in range(channel.size)]
