"""Cluster: ipyparallel engines, their launchers, cells, runs and diagnosis, on the kernel's side."""

from nbdist.cluster.cells.cell_run import CellRun
from nbdist.cluster.cluster import Cluster
from nbdist.cluster.engines.engine_info import Engine
from nbdist.cluster.hosts.fork_client import current_server, end_server
from nbdist.cluster.hosts.host_options import HOST_OPTIONS
from nbdist.cluster.hosts.waiting_hosts import end_hosts, waiting_hosts
from nbdist.cluster.launch.anchor_client import Detached, detached_clusters
from nbdist.cluster.runs.run import Run, attend
from nbdist.cluster.session import current_cluster, last_run, require_cluster
from nbdist.engine.follow.module_texts import watched_modules

__all__ = [
    "HOST_OPTIONS",
    "CellRun",
    "Cluster",
    "Detached",
    "Engine",
    "Run",
    "attend",
    "current_cluster",
    "current_server",
    "detached_clusters",
    "end_hosts",
    "end_server",
    "last_run",
    "require_cluster",
    "waiting_hosts",
    "watched_modules",
]
