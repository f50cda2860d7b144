"""From where a training begins: from its beginning, or from where another one ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbdist.cluster.runs.run import Run
from nbdist.core.params.table import ParamTable
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import check_resume
from nbdist.core.state.restore import check_goes_on, check_same
from nbdist.core.state.snapshot import read
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["resumed"]


def resumed(plan: Plan, task: Any, last: Run | None) -> tuple[Plan, Any]:
    """What `plan.resume` means here: the plan that says it to the ranks, and the last run's snapshots where they do.

    Raises:
        PlanError: There is nothing to go on from, or nothing left to do.
        TaskError: It is another model's or another optimizer's.
    """
    if not plan.resume:
        return plan, None
    if plan.resume is not True or plan.checkpoint:
        check_resume(plan, task.model, task.optimizer)
        return plan, None
    snapshot_store = None if last is None else last.snapshot_store
    found = None if snapshot_store is None else snapshot_store.newest
    if found is None:
        raise PlanError(
            "there is no run to go on with: the last one of this notebook left no snapshot. Name a folder: "
            "--resume DIR."
        )
    saved = CheckpointReader.in_memory(read(found[1]))
    check_same(saved, ParamTable.of(task.model), task.optimizer)
    check_goes_on(saved, plan)
    return replace(plan, resume=""), snapshot_store
