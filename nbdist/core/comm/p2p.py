"""Links: tensors from one rank to another, without waiting for it."""

from __future__ import annotations

import collections
import json
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist

from nbdist.core.comm.process_group import Work

__all__ = ["Link", "Message", "Place", "ProcessGroupLink", "dtype_named", "pack_note", "unpack_note"]

Message = tuple[Any, list[torch.Tensor | None]]
"""A small note of plain data, see `pack_note`, and tensors."""

Place = tuple[str, list[int], int]
"""Dtype, shape and, in a segment, the first byte."""


def pack_note(value: Any) -> bytes:
    """Plain data as bytes: None, bools, numbers and strings in lists, tuples and dicts by string. Never a pickle."""
    return json.dumps(_tagged(value), separators=(",", ":")).encode()


def unpack_note(data: bytes | bytearray) -> Any:
    """What `pack_note` was given. Whatever the bytes are, no code of theirs runs."""
    return _untagged(json.loads(data))


def dtype_named(name: str) -> torch.dtype:
    """A dtype by its name in torch."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch.")
    return found


def _tagged(value: Any) -> Any:
    """JSON has no tuples: each one, and each dict, is an object that says so."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_tagged(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [_tagged(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _tagged(item) for key, item in value.items()}}
    raise TypeError(f"a note between ranks cannot hold {type(value).__name__}: use plain data.")


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(_untagged(item) for item in content)
        return {key: _untagged(item) for key, item in content.items()}
    return value


class Link(ABC):
    """Between two ranks. Messages arrive in the order in which they were sent, each way for itself."""

    @abstractmethod
    def send(self, note: Any, tensors: list[torch.Tensor | None]) -> None:
        """Send a small `note` of plain data and tensors; returns before the peer has them. Local.

        Raises:
            PeerLostError: The peer is gone.
        """

    @abstractmethod
    def receive(self) -> Message:
        """Wait for the next message; an interrupt lands at once. Local.

        Raises:
            PeerLostError: The peer is gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Hang up: a peer that waits gets an error. Local, twice is fine."""


class ProcessGroupLink(Link):
    """Through two `torch.distributed` groups of these two ranks, one each way.

    A message is a length, a header and the bytes of its tensors. Each is a broadcast: torch's own messages over gloo
    can be waited for, but not polled.

    Args:
        rank: This rank.
        peer: The other one.
        groups: The group in which the lower rank sends, and the one in which the higher one does.
        device: Where tensors lie.
    """

    def __init__(self, rank: int, peer: int, groups: tuple[Any, Any], device: torch.device) -> None:
        self._peer = peer
        self._rank = rank
        self._device = device
        self._out, self._in = groups if rank < peer else groups[::-1]
        self._sending: collections.deque[tuple[Work, torch.Tensor]] = collections.deque()

    def send(self, note: Any, tensors: list[torch.Tensor | None]) -> None:
        """See `Link`."""
        while self._sending and self._sending[0][0].done:
            self._sending.popleft()[0].wait()
        places = [None if tensor is None else (str(tensor.dtype)[6:], list(tensor.shape)) for tensor in tensors]
        header = bytearray(pack_note([note, places]))
        self._start(torch.tensor([len(header)]))
        self._start(torch.frombuffer(header, dtype=torch.uint8))
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                self._start(tensor.detach().clone(memory_format=torch.contiguous_format))

    def receive(self) -> Message:
        """See `Link`."""
        length = self._wait_for(torch.zeros(1, dtype=torch.long))
        header = self._wait_for(torch.zeros(int(length.item()), dtype=torch.uint8))
        note, places = unpack_note(header.numpy().tobytes())
        tensors: list[torch.Tensor | None] = []
        for place in places:
            if place is None:
                tensors.append(None)
                continue
            tensor = torch.empty(place[1], dtype=dtype_named(place[0]), device=self._device)
            tensors.append(self._wait_for(tensor) if tensor.numel() else tensor)
        return note, tensors

    def close(self) -> None:
        """See `Link`."""
        self._sending.clear()
        self._out = self._in = None  # or the groups' sockets would stay open

    def _start(self, tensor: torch.Tensor) -> None:
        work = Work.launch(lambda: dist.broadcast(tensor, self._rank, group=self._out, async_op=True))
        self._sending.append((work, tensor))

    def _wait_for(self, tensor: torch.Tensor) -> torch.Tensor:
        Work.launch(lambda: dist.broadcast(tensor, self._peer, group=self._in, async_op=True)).wait()
        return tensor
