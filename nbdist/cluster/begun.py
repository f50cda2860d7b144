"""What has to be known of a run by a kernel that did not begin it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbdist.cluster.replan import Replan

__all__ = ["Begun"]


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What another kernel has to know of a run.

    Args:
        run_id: Its name in the record.
        title: What is trained, for people.
        parcel: Task and plan.
        names: What the person calls model and data.
        hangs: When it hangs, and what is done then.
        replan: See `Run`.
        on_failure: See `Run`.
        vaults: Where the ranks keep their snapshots.
    """

    run_id: str
    title: str
    parcel: Any
    names: tuple[str, str]
    hangs: tuple[float | None, str]
    replan: Replan | None
    on_failure: str
    vaults: tuple[list[str], ...] = ()
