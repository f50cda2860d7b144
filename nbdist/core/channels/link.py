"""Links: tensors from one rank to another, without waiting for it."""

from __future__ import annotations

import collections
import pickle
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist

from nbdist.core.channels.process_group import Work

__all__ = ["Link", "Message", "ProcessGroupLink"]

Message = tuple[Any, list[torch.Tensor | None]]
"""A small picklable note, and tensors."""


class Link(ABC):
    """Between two ranks. Messages arrive in the order in which they were sent, each way for itself."""

    @abstractmethod
    def send(self, note: Any, tensors: list[torch.Tensor | None]) -> None:
        """Send a small picklable `note` and tensors; returns before the peer has them. Local.

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
        places = [None if tensor is None else (tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        header = bytearray(pickle.dumps((note, places)))
        self._start(torch.tensor([len(header)]))
        self._start(torch.frombuffer(header, dtype=torch.uint8))
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                self._start(tensor.detach().clone(memory_format=torch.contiguous_format))

    def receive(self) -> Message:
        """See `Link`."""
        length = self._wait_for(torch.zeros(1, dtype=torch.long))
        header = self._wait_for(torch.zeros(int(length.item()), dtype=torch.uint8))
        note, places = pickle.loads(header.numpy().tobytes())  # from our own process at the other end
        tensors: list[torch.Tensor | None] = []
        for place in places:
            if place is None:
                tensors.append(None)
                continue
            tensor = torch.empty(place[1], dtype=place[0], device=self._device)
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
