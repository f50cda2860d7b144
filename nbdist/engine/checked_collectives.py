"""Checked collectives: in a cell on some ranks only, a collective of more ranks raises instead of hanging."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from nbdist.errors import ClusterError, ranks_text

__all__ = ["allow_all", "allow_only"]

_OF_A_GROUP = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip
_OF_THE_WORLD = ("new_group", "new_subgroups", "new_subgroups_by_enumeration", "destroy_process_group")
_originals: dict[str, Callable[..., Any]] = {}
_participants: frozenset[int] | None = None


def allow_only(ranks: Iterable[int]) -> None:
    """Until `allow_all`, collectives that need other ranks raise `ClusterError`. Local.

    Patches ``torch.distributed``: functions that were imported from it before stay unchecked.
    """
    global _participants
    allow_all()
    _participants = frozenset(ranks)
    for name in (*_OF_A_GROUP, *_OF_THE_WORLD):
        if hasattr(dist, name):
            _originals[name] = getattr(dist, name)
            setattr(dist, name, _checked(name, _originals[name]))


def allow_all() -> None:
    """Restore the collectives of ``torch.distributed``. Local, twice is fine."""
    global _participants
    _participants = None
    while _originals:
        name, original = _originals.popitem()
        setattr(dist, name, original)


def _checked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if _participants is not None:  # None in a function imported during a cell that has ended
            group = signature.bind_partial(*args, **kwargs).arguments.get("group") if name in _OF_A_GROUP else None
            needed = dist.get_process_group_ranks(group or dist.group.WORLD)
            if missing := sorted(set(needed) - _participants):
                raise ClusterError(
                    f"{name} is a collective: it waits for {ranks_text(missing)} too, and this cell runs on "
                    f"{ranks_text(_participants)} only. Omit --ranks, or pass a group of these ranks, "
                    "created in a cell on all ranks."
                )
        return original(*args, **kwargs)

    return checked
