"""Sockets between ranks: Unix sockets within a host, TCP between hosts. Authenticated, and closed in forks."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import select
import socket
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nbdist.core.comm.rendezvous import as_peer_lost
from nbdist.errors import PeerLostError
from nbdist.keepalive import keep_alive
from nbdist.listening import listen_on
from nbdist.peer_auth import IntruderError, authenticate_as_client, authenticate_client
from nbdist.peer_auth import receive_exactly as receive_bytes

__all__ = ["connect", "memory_of", "open_sockets", "receive_exactly", "shut_down"]

_POLL_S = 0.02
"""While a rank waits for a peer to connect: how often it checks that the store still exists."""
_PROOF_WITHIN_S = 10.0
"""A stranger that connects over a network and proves nothing delays the peers by this, and no longer."""

open_sockets: weakref.WeakSet[Any] = weakref.WeakSet()
"""Every channel and link of this process that holds sockets to other ranks."""


def _close_in_fork() -> None:
    """A data-loading process that outlives its killed rank would keep the sockets open, and the peers would wait."""
    for holder in list(open_sockets):
        holder.close()


def shut_down(peers: Iterable[socket.socket]) -> None:
    """End connections, also where another thread waits; closing alone would not wake it."""
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def connect(rank: int, others: Iterable[int], store: Any, name: str, address: str = "") -> list[socket.socket]:
    """One socket to each other rank, in rank order. **Collective**: those call it too, with this rank among theirs.

    A rank connects to those below it, and accepts those above. Each side verifies that the other knows the world's
    secret, and within a host that it is this user's process.

    Args:
        rank: This rank, as the peers number it.
        others: Its peers.
        store: For the rendezvous.
        name: Unique among the users of `store`.
        address: This host's, where the peers reach it over TCP; empty if all are on this host. Then the listener has no
            name in the file system.

    Raises:
        PeerLostError: Another rank, or the store, is gone.
    """
    peers: dict[int, socket.socket] = {}
    below, above = [other for other in others if other < rank], {other for other in others if other > rank}
    purpose = f"{store.generation}/{name}"
    check = functools.partial(store.check, [])  # raises once the ranks are released
    try:
        waiting: Any = _listening(address, len(above) + 1) if above else contextlib.nullcontext()
        with as_peer_lost(), waiting as listener:
            if above:
                bound: Any = listener.getsockname()
                store.set(f"{name}/address/{rank}", "{}:{}".format(*bound) if address else bound.decode())
            for other in below:
                peers[other] = _reach(store.get(f"{name}/address/{other}").decode(), check)
                authenticate_as_client(peers[other], store.secret, f"{purpose}/{other}", rank, check)
            while above - peers.keys():
                while not select.select([listener], [], [], _POLL_S)[0]:
                    check()
                peer, _ = listener.accept()
                try:
                    _prepare(peer)
                    in_time = functools.partial(_check_in_time, check, time.monotonic() + _PROOF_WITHIN_S)
                    other = authenticate_client(peer, store.secret, f"{purpose}/{rank}", in_time)
                except BaseException as error:
                    peer.close()
                    # Every process that sees the address can connect, and over a network any may leave again.
                    if isinstance(error, OSError if address else IntruderError):
                        continue
                    raise
                peers[other] = peer
    except BaseException:
        for peer in peers.values():
            peer.close()
        raise
    return [peers[other] for other in sorted(peers)]


def _listening(address: str, backlog: int) -> Any:
    """A socket that listens at this host's address, or within the host, if that is empty."""
    if address:
        return listen_on(address, backlog)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0nbdist-{secrets.token_hex(16)}")
    listener.listen(backlog)
    return listener


def _check_in_time(check: Callable[[], object], deadline_s: float) -> None:
    check()
    if time.monotonic() > deadline_s:
        raise IntruderError("a process has connected and proves nothing")


def _reach(named: str, check: Callable[[], object]) -> socket.socket:
    """Connect to a rank that listens there; over TCP `check` is called meanwhile, since its host may be gone."""
    host, _, port = named.rpartition(":")
    if not host:
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(named)
        return peer
    peer = socket.socket(socket.AF_INET)
    try:
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            peer.connect((host, int(port)))
        while not select.select([], [peer], [], _POLL_S)[1]:
            check()
        if failed := peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(failed, os.strerror(failed))
        peer.setblocking(True)
        _prepare(peer)
    except BaseException:
        peer.close()
        raise
    return peer


def _prepare(peer: socket.socket) -> None:
    """Send small messages at once, and notice a host that vanishes."""
    if peer.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(peer)


def receive_exactly(peer: socket.socket, length: int) -> bytes:
    """Receive `length` bytes. Raises `PeerLostError` if the peer closes the connection first."""
    try:
        return receive_bytes(peer, length)
    except ConnectionError as error:
        raise PeerLostError(str(error)) from error


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be sent, or received into."""
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
