"""Which functions of this room wait for other ranks: so the stack of a rank says in which collective it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from nbdist.core.comm.channel import Channel, Pending
from nbdist.core.comm.p2p import Link
from nbdist.core.comm.rendezvous import GenerationStore, barrier, start_group

__all__ = ["waiting_calls"]

_NO_COLLECTIVES = {"zeros", "free", "close"}
"""What a channel offers beside collectives."""


def waiting_calls() -> dict[tuple[str, str], str]:
    """What a rank waits in while it runs a function, by the function's file and name. Local."""
    calls: dict[tuple[str, str], str] = {}
    for base in (Channel, Link):
        offered = {name for name, value in vars(base).items() if callable(value) and name[0] != "_"} - _NO_COLLECTIVES
        for kind in _kinds(base):
            for name in offered & set(vars(kind)):
                calls[_place(vars(kind)[name])] = name.removeprefix("start_").strip("_")
    for kind in _kinds(Pending):
        calls |= {_place(value): "a collective" for name, value in vars(kind).items() if name.startswith("wait")}
    at_store = barrier, start_group, GenerationStore.get, GenerationStore.wait
    return calls | {_place(function): "a meeting at the store" for function in at_store}


def _kinds(base: Any) -> Iterator[type]:
    """`base` and what derives from it in this room; elsewhere stand channels that do not wait."""
    yield base
    for kind in base.__subclasses__():
        if kind.__module__.startswith(__package__):
            yield from _kinds(kind)


def _place(function: Any) -> tuple[str, str]:
    code = inspect.unwrap(function).__code__
    return code.co_filename, code.co_name
