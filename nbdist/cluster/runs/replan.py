"""The plan of a run for another number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.plan.mesh import STRATEGY_WORDS

__all__ = ["Replan"]


@dataclass(frozen=True)
class Replan:
    """Makes a run's plan for any number of ranks, with the same global batch.

    A strategy name puts all ranks on its axis; in an explicit mesh only the degree of ``dp`` changes.

    Args:
        options: Of the plan, as the user gave them.
        cores: CPU cores for all ranks together.
    """

    options: dict[str, Any]
    cores: int

    def __call__(self, ranks: int) -> Plan:
        """The plan.

        Raises:
            PlanError: The mesh does not fit on so many ranks, or the batch cannot be partitioned over them.
        """
        options = dict(self.options)
        strategy = str(options.get("strategy") or "data").strip().lower()
        if strategy not in STRATEGY_WORDS:
            options["strategy"] = self._resized(strategy, ranks)
        return Plan.create(ranks=ranks, cores=max(self.cores, ranks), **options)

    @staticmethod
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

    def of(self, plan: Plan, ranks: int) -> Plan:
        """The plan for a running run; keeps what it resumes from."""
        return replace(self(ranks), resume=plan.resume)
