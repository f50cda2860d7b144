"""Shard plan: which shards of weights, optimizer state and buffers this rank saves, under which keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.json_value import plain
from nbdist.core.optim.optimizer_attributes import OwnAttributes
from nbdist.core.optim.state import is_split
from nbdist.core.optim.tensor_references import TensorReferences
from nbdist.core.params.made_buffers import persistence
from nbdist.core.params.param_data_watch import DataWatch
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placement import Placement
from nbdist.core.params.weight_copies import WeightCopies
from nbdist.core.state.first_values import SMALL_BYTES, FirstValues, sampled
from nbdist.errors import TaskError
from nbdist.telemetry.host import host_id

__all__ = ["ShardPlan", "bit_sum", "buffer_entry", "check_state", "gather_texts", "key_of"]


class ShardPlan:
    """What this rank saves. **Collective** over the world: of ranks that hold the same shard, one saves it.

    Args:
        model: Its buffers are looked up each time, since a forward may replace them.
        table: The model's tensors, placed.
        optimizers: Over its parameters, by name.
        axes: This rank's channels.
        copies: Of its weights, saved beside them.
        changed: Buffers and frozen parameters whose values are neither the task's nor those of the checkpoint from
            which the run resumed.

    Attributes:
        described: Shape, dtype and split of the model's tensors, by name.
        replicas: The ranks of each replica that can be resumed from alone; one with all ranks if none can.
        reporting: The ranks that report losses.
    """

    def __init__(
        self, model: nn.Module, table: ParamTable, optimizers: Mapping[str, torch.optim.Optimizer],
        axes: MeshChannels, copies: WeightCopies, changed: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._model = model
        self._table = table
        self._optimizers = optimizers
        self._copies = copies
        self._axes = axes
        self.described = {name: _described(table.placement(name), axes) for name in table.tensors}
        candidates: dict[str, tuple[str, int]] = {
            name: (_key(name, "", table.placement(name), axes), tensor.nbytes)
            for name, tensor in table.parameters.items()
            if table.placement(name).held(axes) and (not tensor.requires_grad or table.is_updated(name, axes))
        }
        own = json.dumps([host_id(), axes.dp.rank, axes.reports_loss, [*candidates.values()]])
        hosts, places, reporting, held = zip(*map(json.loads, gather_texts(own, axes.world)), strict=True)
        self.reporting = [rank for rank, reports in enumerate(reporting) if reports]
        self.replicas = _replicas([hosts, places], held)
        saver_of = _assign(dict(enumerate(held)))
        self._saved = [name for name, (key, _) in candidates.items() if saver_of[key] == axes.world.rank]
        saver_of = _assign({rank: held[rank] for rank in self.replica})
        self._saved_alone = [name for name, (key, _) in candidates.items() if saver_of[key] == axes.world.rank]
        self._first_values = FirstValues(model, table, self._saved_alone, changed) if len(self.replicas) > 1 else None
        self._versions = {name: buffer._version for name, buffer in self._buffers() if name not in changed}
        self._frozen = [name for name in self._saved if not table.parameters[name].requires_grad]
        self._frozen_changed = any(name in changed for name in self._frozen)
        self._frozen_sums: dict[str, int] | None = None
        self._accessed: set[int] = set()  # indices of frozen parameters whose `.data` was read
        self._initial_fingerprints = self._fingerprints()
        # Under shard, a write through `.data` is refused, and between steps a rank holds parts only.
        watched = {} if axes.shard.size > 1 else {i: table.parameters[name] for i, name in enumerate(self._frozen)}
        self._watch = DataWatch(watched.values(), self._on_data_access)
        self._references = TensorReferences(table.objects)
        self._attributes = {name: OwnAttributes(one, self._references) for name, one in optimizers.items()}

    @property
    def replica(self) -> list[int]:
        """The ranks of this rank's replica, see `replicas`."""
        return next(ranks for ranks in self.replicas if self._axes.world.rank in ranks)

    def stands_alone(self) -> bool:
        """Whether this rank's replica has all that others have: nothing in it differs from replica to replica. Local.

        On a GPU this waits for it.
        """
        first = self._first_values
        return first is not None and not self.frozen_changed() and not [*self._made()] and first.unchanged()

    def changing(self, *, buffers: bool = False, alone: bool = False) -> dict[str, torch.Tensor]:
        """What steps change: trainable parameters, optimizer state, buffers, and frozen parameters if changed. Local.

        Args:
            buffers: Whether to include large buffers that have not changed since the start.
            alone: Whether to include this rank's share of its replica, if it `stands_alone`.
        """
        table, axes = self._table, self._axes
        frozen_changed = self.frozen_changed()
        shards = {}
        for name in dict.fromkeys([*self._saved, *(self._saved_alone if alone else ())]):
            parameter, placement = table.parameters[name], table.placement(name)
            if not (parameter.requires_grad or frozen_changed):
                continue
            shards[_key(name, "", placement, axes)] = parameter.detach()
            for entry, value in _state(parameter, self._optimizers.values()):
                if isinstance(value, torch.Tensor):
                    split = is_split(entry, value, parameter.shape)
                    part = placement if split else Placement(layout=placement.layout)
                    shards[_key(name, entry, part, axes)] = value.detach()
            shards |= {_key(name, entry, placement, axes): copy for entry, copy in self._copies.of(name).items()}
        for name, buffer in self._buffers():
            changes = buffer.nbytes <= SMALL_BYTES or buffer._version != self._versions.get(name)
            if changes or (buffers and axes.data.rank == 0):
                shards[_key(name, buffer_entry(axes.data.rank), table.placement(name), axes)] = buffer.detach()
            if axes.data.rank == 0 or alone:
                copies = self._copies.of(name)
                shards |= {_key(name, entry, table.placement(name), axes): copy for entry, copy in copies.items()}
        for name, buffer in self._made():
            shards[key_of(name, buffer_entry(axes.data.rank), None, None)] = buffer.detach()
        return shards

    def made(self) -> dict[str, Any]:
        """The buffers that a forward has made, or given another shape, described as in `described`. Local."""
        kept = persistence(self._model)
        return {
            name: {**_described(Placement(layout=buffer), self._axes), "persistent": kept[name]}
            for name, buffer in self._made()
        }

    def _made(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, buffer in self._model.named_buffers() if not self._axes.tp.rank else ():
            known = self.described.get(name)
            if known is None or known["shape"] != list(buffer.shape) or known["dtype"] != str(buffer.dtype)[6:]:
                yield name, buffer

    def frozen(self) -> dict[str, torch.Tensor]:
        """The frozen parameters, if no step has changed them. Local."""
        table = self._table
        return {
            _key(name, "", table.placement(name), self._axes): table.parameters[name].detach()
            for name in (() if self._frozen_changed else self._frozen)
        }

    def frozen_sums(self) -> dict[str, int]:
        """The sum of the bits of each of `frozen`, by its key. Local; computed once."""
        if self._frozen_sums is None:
            self._frozen_sums = {key: bit_sum(tensor) for key, tensor in self.frozen().items()}
        return {} if self.frozen_changed() else self._frozen_sums

    def frozen_changed(self) -> bool:
        """Whether steps change parameters that take no gradient, such as an EMA teacher. Local.

        If one changes, all of them count as changed, and are saved with the trainable ones.
        """
        self._frozen_changed = self._frozen_changed or self._fingerprints() != self._initial_fingerprints
        return self._frozen_changed

    def _fingerprints(self) -> list[Any]:
        """A fingerprint of each frozen parameter, which differs after a write.

        A teacher is mostly written through ``.data``, which leaves `_version` as it is: if ``.data`` was read, all
        values are hashed; of other parameters some are compared, since ``.data`` may have been read before the run.
        """
        parameters = [self._table.parameters[name].detach() for name in self._frozen]
        fingerprints: list[Any] = [
            (parameter._version, _digest(parameter) if i in self._accessed else b"")
            for i, parameter in enumerate(parameters)
        ]
        return [*fingerprints, *sampled(parameters)]

    def _on_data_access(self, i: int) -> None:
        """The user's code reads ``.data`` of a frozen parameter: from now on all of its values are hashed."""
        if i not in self._accessed and not self._frozen_changed:
            self._accessed.add(i)
            self._initial_fingerprints[i] = (
                self._initial_fingerprints[i][0],
                _digest(self._table.parameters[self._frozen[i]].detach()),
            )

    def close(self) -> None:
        """Stop watching ``.data``. Local, twice is fine."""
        self._watch.close()

    def values(self) -> dict[str, Any]:
        """The optimizers' state beside tensors, as JSON-able data. Local.

        Raises:
            TaskError: It has state that JSON cannot hold.
        """
        names = {id(parameter): name for name, parameter in self._table.parameters.items()}
        settings = {
            name: {
                "groups": [self._group(group, names) for group in optimizer.param_groups],
                "attributes": self._attributes[name].state_dict(),
            }
            for name, optimizer in self._optimizers.items()
        }
        values: dict[str, dict[str, Any]] = {}
        for name, parameter in self._table.parameters.items():
            for entry, value in _state(parameter, self._optimizers.values()):
                if not isinstance(value, torch.Tensor):
                    values.setdefault(name, {})[entry] = plain(value, f"the optimizer's {entry}")
        copies = {"copies": self._copies.state_dict()} if self._copies.tensors else {}
        return {"optimizers": settings, "values": values, **copies}

    def _group(self, group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
        own = {key: value for key, value in group.items() if key != "params"}
        settings = {key: self._references.to_json(value, f"the optimizer's {key}") for key, value in own.items()}
        return {**settings, "params": [names[id(parameter)] for parameter in group["params"]]}

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers that this rank saves: of ranks that read the same data, one does."""
        if self._axes.tp.rank:
            return
        made = {name for name, _ in self._made()}
        for name, buffer in self._model.named_buffers(remove_duplicate=False):  # the table has each one once
            placed = name in self._table.buffers and self._table.placement(name).held(self._axes)
            if placed and name not in made:
                yield name, buffer


def _digest(parameter: torch.Tensor) -> bytes:
    """A hash of its values. Waits for the device."""
    flat = parameter.reshape(-1).view(torch.uint8).cpu()
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()


def bit_sum(tensor: torch.Tensor) -> int:
    """The sum of the bits of its values, as integers: that of a tensor is that of its parts, which zeros may fill up.

    Waits for the device.
    """
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    flat = tensor.detach().reshape(-1).contiguous()
    return int(flat.view(kinds.get(flat.element_size(), torch.int64)).sum(dtype=torch.int64)) % 2**64


def buffer_entry(data_rank: int) -> str:
    """The entry under which the rank at this data coordinate saves a buffer: running statistics differ by rank."""
    return f"@{data_rank}" if data_rank else ""


def check_state(table: ParamTable, optimizers: Collection[torch.optim.Optimizer]) -> None:
    """Raise `TaskError` if an optimizer has state that cannot be saved; known after its first step. Local."""
    for name, parameter in table.parameters.items():
        placement = table.placement(name)
        for entry, value in _state(parameter, optimizers):
            if not isinstance(entry, str) or "|" in entry or entry.startswith("@"):
                raise TaskError(f"the optimizer's state {entry!r} cannot be saved: name it by a word.")
            if not isinstance(value, torch.Tensor):
                plain(value, f"the optimizer's {entry}")
            elif (placement.cut or placement.sharded) and value.ndim and not is_split(entry, value, parameter.shape):
                raise TaskError(
                    f"the optimizer's {entry} of {name} has shape {list(value.shape)}, which is not its parameter's: "
                    "on a mesh with tp or shard it cannot be saved; use another optimizer, or dp or pp."
                )


def key_of(name: str, entry: str, tp: int | None, shard: int | None) -> str:
    """The key of a shard in a checkpoint: its tensor, the entry of its optimizer state, and which part it is.

    Args:
        name: The parameter or buffer.
        entry: The entry of its optimizer state, or empty for the tensor itself.
        tp: The coordinate on ``tp``; None if the tensor is not split over it.
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


def _replicas(places: list[Sequence[Any]], held: Sequence[list[tuple[str, int]]]) -> list[list[int]]:
    """The ranks of each replica: of one host, or else of one ``dp`` coordinate, if they hold all keys; else all ranks.

    Args:
        places: The host of each rank, and its ``dp`` coordinate.
        held: The keys of each rank, with their bytes.
    """
    keys = {key for own in held for key, _ in own}
    for place_of in places:
        replicas = [[r for r, place in enumerate(place_of) if place == one] for one in dict.fromkeys(place_of)]
        if len(replicas) > 1 and all(keys == {key for r in ranks for key, _ in held[r]} for ranks in replicas):
            return replicas
    return [[*range(len(held))]]


def _assign(candidates: Mapping[int, list[tuple[str, int]]]) -> dict[str, int]:
    """The rank that saves each key, balanced by bytes: largest first, to the holder that saves least so far."""
    holders: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for rank, shards in candidates.items():
        for key, nbytes in shards:
            holders.setdefault(key, []).append(rank)
            sizes[key] = nbytes
    loads = dict.fromkeys(candidates, 0)
    saver_of = {}
    for key in sorted(holders, key=lambda key: (len(holders[key]), -sizes[key])):
        saver_of[key] = min(holders[key], key=loads.__getitem__)
        loads[saver_of[key]] += sizes[key]
    return saver_of


def _state(parameter: nn.Parameter, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[Any, Any]]:
    """The entries of a parameter's state, in the optimizer that updates it."""
    for optimizer in optimizers:
        yield from optimizer.state.get(parameter, {}).items()


def _described(placement: Placement, axes: MeshChannels) -> dict[str, Any]:
    cut = placement.cut
    return {
        "shape": list(placement.layout.shape),
        "dtype": str(placement.layout.dtype)[6:],
        "cut": None if cut is None else {"dim": cut.dim, "sections": list(cut.sections)},
        "tp": axes.tp.size if cut else 1,
        "shard": axes.shard.size if placement.sharded else 1,
    }


def gather_texts(text: str, channel: Channel) -> list[str]:
    """The texts of all ranks, ordered by rank. **Collective**."""
    return [channel.broadcast_bytes(text.encode(), rank).decode() for rank in range(channel.size)]
