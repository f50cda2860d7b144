"""Whether engines are ready for something new."""

from __future__ import annotations

from nbdist.cluster.engines import Engines
from nbdist.errors import ClusterError, ranks_text

__all__ = ["make_ready"]


def make_ready(engines: Engines) -> None:
    """Make sure that all engines live and listen; form a new world if the last one broke.

    Raises:
        ClusterError: They do not.
    """
    engines.check_alive()
    if engines.lost:
        raise ClusterError(
            f"the engine of {ranks_text(engines.lost)} is lost: %dist_start (or cluster.start()) replaces it."
        )
    if engines.stuck:
        raise ClusterError(
            f"{ranks_text(engines.stuck)} did not react to an interrupt and still runs its cell, perhaps inside a "
            "collective: %dist_stop ends it."
        )
    if not engines.formed:
        engines.form()
