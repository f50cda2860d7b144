"""Point-to-point messages between two ranks (`Link`): a send does not wait for the receiver."""

from __future__ import annotations

import collections
import json
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist

from nbdist.core.comm.process_group import Work

__all__ = ["Link", "Message", "ProcessGroupLink", "TensorSpec", "dtype_named", "pack_note", "unpack_note"]

Message = tuple[Any, list[torch.Tensor | None]]
"""A small note of plain data, see `pack_note`, and tensors."""

TensorSpec = tuple[str, list[int], int]
"""Dtype, shape and the tensor's first byte in a segment."""


def pack_note(value: Any) -> bytes:
    """Plain data as bytes: None, bools, numbers and strings in lists, tuples and dicts by string. Never a pickle."""
    return json.dumps(_tagged(value), separators=(",", ":")).encode()


def unpack_note(data: bytes | bytearray) -> Any:
    """The inverse of `pack_note`; it runs no code, whatever the bytes are."""
    return _untagged(json.loads(data))


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype with this name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not a torch dtype.")
    return found


def _tagged(value: Any) -> Any:
    """JSON has no tuples, so each tuple becomes ``{"tuple": [...]}``, and each dict ``{"dict": {...}}``."""
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
    """Messages between two ranks. Each direction keeps the order in which they were sent."""

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
        """Close: a peer that waits gets an error. Local, twice is fine."""


class ProcessGroupLink(Link):
    """A link over two `torch.distributed` groups of these two ranks, one for each direction.

    A message is a length, a header and the bytes of its tensors, which arrive on the device or on the CPU, as they were
    sent. Each is a broadcast: gloo's own send and receive can be waited for, but not polled.

    Args:
        rank: This rank.
        peer: The other rank.
        groups: The group in which the lower rank sends, and the one in which the higher rank sends.
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
        specs = [
            None if t is None else (str(t.dtype)[6:], list(t.shape), t.device.type == self._device.type)
            for t in tensors
        ]
        header = bytearray(pack_note([note, specs]))
        self._start(torch.tensor([len(header)]))
        self._start(torch.frombuffer(header, dtype=torch.uint8))
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                own = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
                self._start(own.view(-1).view(torch.uint8))  # gloo and nccl do not know every dtype

    def receive(self) -> Message:
        """See `Link`."""
        length = self._wait_for(torch.zeros(1, dtype=torch.long))
        header = self._wait_for(torch.zeros(int(length.item()), dtype=torch.uint8))
        note, specs = unpack_note(header.numpy().tobytes())
        tensors: list[torch.Tensor | None] = []
        for spec in specs:
            if spec is None:
                tensors.append(None)
                continue
            name, shape, on_device = spec
            tensor = torch.empty(shape, dtype=dtype_named(name), device=self._device if on_device else "cpu")
            if tensor.numel():
                self._wait_for(tensor.view(-1).view(torch.uint8))
            tensors.append(tensor)
        return note, tensors

    def close(self) -> None:
        """See `Link`."""
        self._sending.clear()
        self._out = self._in = None  # a live reference would keep the groups' sockets open

    def _start(self, tensor: torch.Tensor) -> None:
        work = Work.launch(lambda: dist.broadcast(tensor, self._rank, group=self._out, async_op=True))
        self._sending.append((work, tensor))

    def _wait_for(self, tensor: torch.Tensor) -> torch.Tensor:
        Work.launch(lambda: dist.broadcast(tensor, self._peer, group=self._in, async_op=True)).wait()
        return tensor
