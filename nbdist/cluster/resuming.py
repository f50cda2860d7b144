"""From where a training begins: from its beginning, or from where another one ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbdist.cluster.run import Run
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["asked_again", "resumed"]


def asked_again(last: Run | None, options: dict[str, Any]) -> dict[str, Any]:
    """What the last run of this notebook was asked for, to go on from there with other options.

    Raises:
        PlanError: There was none.
    """
    if last is None or "model" not in last.asked:  # or another kernel was asked
        raise PlanError("there is no run of this notebook to go on with: name a model, data and a folder.")
    asked = {**last.asked, **options}
    if "steps" in options:
        asked.pop("epochs", None)
    if "epochs" in options:
        asked.pop("steps", None)
    asked["resume"] = options.get("resume", True)
    return asked


def resumed(plan: Plan, task: Any, last: Run | None) -> tuple[Plan, Any]:
    """What `plan.resume` means here: the plan that says it to the ranks, and the last run's snapshots where they do.

    Raises:
        PlanError: There is nothing to go on from, or nothing left to do.
        TaskError: It is another model's or another optimizer's.
    """
    from nbdist.core.checkpoint import check_resume
    from nbdist.core.params import ParamTable
    from nbdist.core.restore import check_goes_on, check_same
    from nbdist.core.saved import Saved
    from nbdist.core.snapshot import read

    if not plan.resume:
        return plan, None
    if plan.resume is not True or plan.checkpoint:
        check_resume(plan, task.model, task.optimizer)
        return plan, None
    vaults = None if last is None else last.vaults
    found = None if vaults is None else vaults.newest
    if found is None:
        raise PlanError(
            "there is no run to go on with: the last one of this notebook left no snapshot. Name a folder: "
            "--resume DIR."
        )
    saved = Saved.in_memory(read(found[1]))
    check_same(saved, ParamTable.of(task.model), task.optimizer)
    check_goes_on(saved, plan)
    return replace(plan, resume=""), vaults
