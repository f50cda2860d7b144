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

    A strategy that is a word lays all ranks on its axis; of a mesh that was written out, ``dp`` grows and shrinks.

    Args:
        options: Of the plan, as they were asked for.
        cores: CPU cores that there are for all ranks.
    """

    options: dict[str, Any]
    cores: int

    def __call__(self, ranks: int) -> Plan:
        """The plan.

        Raises:
            PlanError: The mesh cannot be laid on so many ranks, or the batch not be cut for them.
        """
        options = dict(self.options)
        strategy = str(options.get("strategy") or "data").strip().lower()
        if strategy not in STRATEGY_WORDS:
            options["strategy"] = self._grown(strategy, ranks)
        return Plan.create(ranks=ranks, cores=max(self.cores, ranks), **options)

    @staticmethod
    def _grown(strategy: str, ranks: int) -> str:
        degrees = dict(part.replace(" ", "").split("=") for part in strategy.split(","))
        others = 1
        for axis, degree in degrees.items():
            others *= int(degree) if axis != "dp" else 1
        if ranks % others:
            raise PlanError(
                f"a run on {strategy} cannot go on on {ranks} engines: only dp changes, so use a multiple of {others}."
            )
        return ",".join(f"{axis}={n}" for axis, n in {**degrees, "dp": ranks // others}.items())

    def of(self, plan: Plan, ranks: int) -> Plan:
        """The plan, for a run that goes on and may have begun elsewhere."""
        return replace(self(ranks), resume=plan.resume)
