"""WHERE the ranks live: ipyparallel engines, launchers, definitions, relay, remote errors."""

from nbdist.cluster.anchor import Detached, detached_clusters
from nbdist.cluster.cells import CellRun
from nbdist.cluster.cluster import Cluster
from nbdist.cluster.current import current_cluster, last_run, require_cluster
from nbdist.cluster.engines import Engine
from nbdist.cluster.fork_server import current_server, end_server
from nbdist.cluster.run import Run

__all__ = [
    "CellRun",
    "Cluster",
    "Detached",
    "Engine",
    "Run",
    "current_cluster",
    "current_server",
    "detached_clusters",
    "end_server",
    "last_run",
    "require_cluster",
]
