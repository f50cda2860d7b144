"""The sockets of torch's process groups, to which torch gives no access: kept alive, shut, closed in forks.

They are found as the sockets that a process has more after it has made a group, by their names in /proc/self/fd;
elsewhere than on Linux none are found, and nothing is done.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

from nbdist.keepalive import keep_alive, leads_elsewhere

__all__ = ["keeping_alive", "noting_group_sockets", "shut_connections"]

_noted: set[str] = set()
"""Of process groups, by name."""


def _descriptors() -> Iterator[tuple[int, str]]:
    """The sockets that this process has open."""
    with contextlib.suppress(FileNotFoundError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
                if (name := os.readlink(f"/proc/self/fd/{number}")).startswith("socket:"):
                    yield int(number), name


def _names() -> set[str]:
    return {name for _, name in _descriptors()}


def _opened(names: set[str], *, others: bool = False) -> Iterator[socket.socket]:
    """The sockets of these names, or those of all others, as objects that close only themselves."""
    for number, name in list(_descriptors()):
        if (name in names) is not others:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as peer:  # else just closed
                yield peer


@contextlib.contextmanager
def keeping_alive() -> Iterator[None]:
    """Context: the connections to other hosts that are made within fail when their host vanishes; see `keep_alive`."""
    before = _names()
    yield
    for peer in _opened(before, others=True):
        keep_alive(peer)


@contextlib.contextmanager
def noting_group_sockets() -> Iterator[None]:
    """Context: the sockets that are made within belong to process groups; they are kept alive as in `keeping_alive`."""
    before = _names()
    with keeping_alive():
        yield
    _noted.intersection_update(before)  # those that are still open
    _noted.update(_names() - before)


def shut_connections() -> None:
    """Shut the groups' connections to other hosts, before the groups are destroyed. Local, twice is fine.

    gloo's destructor waits for messages to or from a peer whose host has vanished. Within a host, the end of a peer
    closes its connections. Listening sockets are left alone: gloo aborts the process when one of them fails.
    """
    for peer in _opened(_noted):
        if leads_elsewhere(peer):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


def _close_in_fork() -> None:
    """In a data-loading process they would stay open when its rank closes them, and the peers would not notice."""
    for number, name in list(_descriptors()):
        if name in _noted:
            os.close(number)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)
