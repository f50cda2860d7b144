"""Resume: where a run starts: at step 0, from a checkpoint, or from the last run's snapshot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbdist.cluster.runs.run_control import RunControl
from nbdist.core.params.param_table import ParamTable
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import check_resume
from nbdist.core.state.restore import check_can_resume, check_same
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["resumed"]


def resumed(plan: Plan, task: Any, last: RunControl | None) -> tuple[Plan, Any]:
    """Resolve `plan.resume`: the plan for the ranks, and the last run's snapshots if the run resumes from them.

    Raises:
        PlanError: There is nothing to resume from, or no steps are left.
        TaskError: The saved state is of another model or optimizer.
    """
    if not plan.resume:
        return plan, None
    if plan.resume is not True or plan.checkpoint:
        check_resume(plan, task.model, task.optimizers)
        return plan, None
    if plan.rehearse:
        return replace(plan, resume=""), None
    snapshot_store = None if last is None else last.snapshot_store
    if snapshot_store is not None:
        snapshot_store.refresh()
    saved = None if snapshot_store is None else CheckpointReader.of_snapshot(snapshot_store.paths)
    if saved is None:
        raise PlanError(
            "there is no run to resume: the last one of this notebook left no snapshot. Name a folder: --resume DIR."
        )
    check_same(saved, ParamTable.of(task.model), task.optimizers)
    check_can_resume(saved, plan)
    return replace(plan, resume=""), snapshot_store
