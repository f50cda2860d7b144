"""`Cluster.complete`: tab completion on an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdist.cluster.cluster import Cluster

__all__ = ["complete"]

_COMPLETED_WITHIN_S = 0.3


def complete(cluster: Cluster, source: str, rank: int = 0) -> tuple[str, list[str]]:
    """Tab completion on one engine: the word at the end of `source`, and its completions.

    Empty at once while the engines are busy, and after 0.3 s if the engine does not answer.
    """
    if not cluster.reachable or rank >= cluster.size or cluster.engines[rank].state != "idle":
        return "", []
    call = cluster._running().start_call(rank, "complete", source)
    call.wait(_COMPLETED_WITHIN_S)
    return call.result() if call.succeeded else ("", [])
