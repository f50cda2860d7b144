"""Session: the running cluster and the newest run of this kernel."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import TYPE_CHECKING

from nbdist.errors import ClusterError

if TYPE_CHECKING:
    from nbdist.cluster.cluster import Cluster
    from nbdist.cluster.runs.run import Run

__all__ = ["current_cluster", "engines_here", "last_run", "note_run", "require_cluster", "set_cluster", "stop_at_exit"]

_cluster: Cluster | None = None
_owner = 0
_run: Run | None = None


def current_cluster() -> Cluster | None:
    """The running cluster of this kernel, or None; a forked child has none."""
    return _cluster if _owner == os.getpid() else None


def engines_here() -> int:
    """How many engines this kernel has; a forked child has none."""
    cluster = current_cluster()
    return 0 if cluster is None else cluster.size


def require_cluster() -> Cluster:
    """The running cluster of this kernel.

    Raises:
        ClusterError: None is running.
    """
    cluster = current_cluster()
    if cluster is None:
        raise ClusterError("no engines are running: start them with %dist_start, or nbdist.Cluster(engines=2).start().")
    return cluster


def set_cluster(cluster: Cluster | None) -> None:
    """Called by a cluster when it has started or stopped."""
    global _cluster, _owner
    _cluster, _owner = cluster, os.getpid()


def last_run() -> Run | None:
    """The newest run of this kernel, or None."""
    return _run


def note_run(run: Run) -> None:
    """Called by a cluster when a run starts; the run before it can no longer be resumed, and frees its memory."""
    global _run
    if _run is not None:
        _run.control.forget(but=run.control)
    _run = run


def stop_at_exit(cluster: Cluster) -> None:
    """Stop a cluster when this process ends; a weak reference, so as not to keep it alive."""
    atexit.register(_stop_reference, weakref.ref(cluster))


def _stop_reference(reference: weakref.ref[Cluster]) -> None:
    cluster = reference()
    if cluster is not None:
        cluster.stop()
