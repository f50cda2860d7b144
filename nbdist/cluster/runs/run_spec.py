"""The run spec: what a run is, decided before it starts; and what another kernel needs to reattach to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbdist.cluster.runs.replan import replan
from nbdist.errors import PlanError, suggest
from nbdist.plan import Plan

if TYPE_CHECKING:
    from nbdist.core.task.task import Task

__all__ = ["ON_FAILURE", "ON_HANG", "RunHandoff", "RunSpec"]

ON_FAILURE = ("replace", "shrink", "stop")
ON_HANG = ("replace", "stop")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run is.

    Args:
        run_id: Its name in the record.
        task: What is trained: model, data, step and optimizer. None once it is forgotten, and where it is sent apart.
        plan: How, on the present number of ranks.
        title: The task, for display.
        names: The user's names of model and data, for errors.
        options: Those of the plan, as the user gave them.
        cores: CPU cores of all ranks together.
        on_failure: When engines are lost: "replace" them, "shrink" to those that are left, or "stop".
        hang_timeout: Seconds without a step after which the run hangs; None for no limit.
        on_hang: Then "replace" the ranks that the others wait for, or "stop".

    Raises:
        PlanError: A value is not possible.
    """

    run_id: str
    task: Task | None = field(repr=False)
    plan: Plan
    title: str
    names: tuple[str, str] = ("model", "data")
    options: dict[str, Any] = field(default_factory=dict)
    cores: int = 1
    on_failure: str = "replace"
    hang_timeout: float | None = None
    on_hang: str = "replace"

    def __post_init__(self) -> None:
        timeout_s = self.hang_timeout
        number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
        if timeout_s is not None and not (number and 0 < timeout_s < math.inf):
            raise PlanError(f"a hang timeout of {timeout_s!r} is not possible: use seconds, more than 0.")
        for name, words in (("on_failure", ON_FAILURE), ("on_hang", ON_HANG)):
            word = getattr(self, name)
            if word not in words:
                raise PlanError(f"unknown {name} {word!r}: use {', '.join(words)}.{suggest(str(word), words)}")

    def plan_for(self, ranks: int) -> Plan:
        """The plan on another number of ranks; it keeps what the run resumes from.

        Raises:
            PlanError: The mesh does not fit on so many ranks, or the batch cannot be partitioned over them.
        """
        return replace(replan(self.options, ranks, self.cores), resume=self.plan.resume)


@dataclass(frozen=True, kw_only=True)
class RunHandoff:
    """What another kernel needs to reattach to a run.

    Args:
        spec: The run, without its task.
        payload: Task and plan.
        snapshot_paths: Of the ranks' snapshot buffers; see `SnapshotStore`.
    """

    spec: RunSpec
    payload: Any
    snapshot_paths: tuple[list[str], ...] = ()
