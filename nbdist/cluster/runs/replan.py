"""The plan of a run for another number of ranks."""

from __future__ import annotations

from typing import Any

from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.plan.mesh import STRATEGY_WORDS

__all__ = ["replan"]


def replan(options: dict[str, Any], ranks: int, cores: int) -> Plan:
    """Make a run's plan for any number of ranks, with the same global batch.

    A strategy name puts all ranks on its axis; in an explicit mesh only the degree of ``dp`` changes.

    Args:
        options: Of the plan, as the user gave them.
        ranks: How many.
        cores: CPU cores for all ranks together.

    Raises:
        PlanError: The mesh does not fit on so many ranks, or the batch cannot be partitioned over them.
    """
    strategy = str(options.get("strategy") or "data").strip().lower()
    resized = {} if strategy in STRATEGY_WORDS else {"strategy": _resized(strategy, ranks)}
    return Plan.create(ranks=ranks, cores=max(cores, ranks), **{**options, **resized})


def _resized(strategy: str, ranks: int) -> str:
    degrees = dict(part.replace(" ", "").split("=") for part in strategy.split(","))
    others = 1
    for axis, degree in degrees.items():
        others *= int(degree) if axis != "dp" else 1
    if ranks % others:
        raise PlanError(
            f"a run on {strategy} cannot use {ranks} engines: only dp changes, so use a multiple of {others}."
        )
    return ",".join(f"{axis}={n}" for axis, n in {**degrees, "dp": ranks // others}.items())
