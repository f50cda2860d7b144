"""Which functions block on other ranks: with them a rank's stack trace shows in which collective it waits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from nbdist.core.comm.channel import Channel, Pending
from nbdist.core.comm.p2p import Link
from nbdist.core.comm.peer_sockets import connect
from nbdist.core.comm.rendezvous import GenerationStore, barrier, start_group

__all__ = ["waiting_calls"]

_NOT_BLOCKING = {"zeros", "free", "close", "common", "common_memory", "slabs", "mapped", "groups", "used_for"}
"""Public methods that do not wait for other ranks, or wait in a function that is listed by itself."""


def waiting_calls() -> dict[tuple[str, str], str]:
    """The collective that a rank waits in, by file and name of the function that it runs. Local."""
    calls: dict[tuple[str, str], str] = {}
    for base in (Channel, Link):
        for kind in _kinds(base):  # not only what the base offers: strategies call a channel's barrier directly
            for name, value in vars(kind).items():
                if callable(value) and name[0] != "_" and name not in _NOT_BLOCKING:
                    calls[_location(value)] = name.removeprefix("start_").strip("_")
    for kind in _kinds(Pending):
        calls |= {_location(value): "a collective" for name, value in vars(kind).items() if name.startswith("wait")}
    at_store = barrier, start_group, GenerationStore.get, GenerationStore.wait
    calls |= {_location(function): "a rendezvous at the store" for function in at_store}
    return calls | {_location(connect): "connect"}


def _kinds(base: Any) -> Iterator[type]:
    """`base` and its subclasses in this package; subclasses elsewhere do not wait."""
    yield base
    for kind in base.__subclasses__():
        if kind.__module__.startswith(__package__):
            yield from _kinds(kind)


def _location(function: Any) -> tuple[str, str]:
    code = inspect.unwrap(function).__code__
    return code.co_filename, code.co_name
