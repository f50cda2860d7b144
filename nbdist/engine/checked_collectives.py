"""Attendance: a collective in a cell that some of its ranks do not run is an error, and no hang."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from nbdist.errors import ClusterError, ranks_text

__all__ = ["expect", "expect_all"]

_OF_A_GROUP = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip
_OF_THE_WORLD = ("new_group", "new_subgroups", "new_subgroups_by_enumeration", "destroy_process_group")
_originals: dict[str, Callable[..., Any]] = {}
_present: frozenset[int] | None = None


def expect(ranks: Iterable[int]) -> None:
    """Only these ranks run what comes: until `expect_all`, collectives that need others raise `ClusterError`. Local.

    It holds for what is called as ``torch.distributed.all_reduce`` and the like, or imported from there meanwhile.
    """
    global _present
    expect_all()
    _present = frozenset(ranks)
    for name in (*_OF_A_GROUP, *_OF_THE_WORLD):
        if hasattr(dist, name):
            _originals[name] = getattr(dist, name)
            setattr(dist, name, _checked(name, _originals[name]))


def expect_all() -> None:
    """All ranks run what comes. Local, twice is fine."""
    global _present
    _present = None
    while _originals:
        name, original = _originals.popitem()
        setattr(dist, name, original)


def _checked(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if _present is not None:  # else it was imported, and the cell has ended
            group = signature.bind_partial(*args, **kwargs).arguments.get("group") if name in _OF_A_GROUP else None
            needed = dist.get_process_group_ranks(group or dist.group.WORLD)
            if missing := sorted(set(needed) - _present):
                raise ClusterError(
                    f"{name} is a collective: it waits for {ranks_text(missing)} too, and this cell runs on "
                    f"{ranks_text(_present)} only. Leave --ranks away, or give it a group of these, "
                    "made in a cell on all ranks."
                )
        return original(*args, **kwargs)

    return checked
