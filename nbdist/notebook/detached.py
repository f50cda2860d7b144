"""The detached clusters as a table, for ``%dist_clusters``."""

from __future__ import annotations

from nbdist.cluster import Detached
from nbdist.telemetry.run_view import table_bundle
from nbdist.telemetry.units import duration

__all__ = ["clusters_bundle"]

_COLUMNS = ("cluster", "engines", "belongs to", "newest run", "state")


def clusters_bundle(clusters: list[Detached]) -> dict[str, str]:
    """Clusters as a table, by MIME type."""
    return table_bundle(_COLUMNS, [_row(cluster) for cluster in clusters])


def _row(cluster: Detached) -> tuple[str, ...]:
    owner = f"kernel {cluster.owner}" if cluster.owner else f"nobody, ends in {duration(max(0.0, cluster.left_s))}"
    return cluster.name, str(cluster.engines), owner, cluster.run_id or "–", cluster.run_state or "–"
