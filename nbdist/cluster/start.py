"""Beginning a training: from its beginning, or from where another one ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbdist.cluster.definitions import CellSources
from nbdist.cluster.engines import Engines
from nbdist.cluster.relay import Relay
from nbdist.cluster.run import Run
from nbdist.cluster.training import Training
from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.record import new_run_id

__all__ = ["resumed", "start_training"]


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
    from nbdist.core.snapshot import newest, read

    if not plan.resume:
        return plan, None
    if plan.resume is not True or plan.checkpoint:
        check_resume(plan, task.model, task.optimizer)
        return plan, None
    vaults = None if last is None else last.vaults
    found = None if vaults is None else newest(vaults.paths)
    if found is None:
        raise PlanError(
            "there is no run to go on with: the last one of this notebook left no snapshot. Name a folder: "
            "--resume DIR."
        )
    saved = Saved.in_memory(read(found[1]))
    check_same(saved, ParamTable.of(task.model), task.optimizer)
    check_goes_on(saved, plan)
    return replace(plan, resume=""), vaults


def start_training(
    engines: Engines,
    task: Any,
    plan: Plan,
    packed: tuple[Any, Any],
    outbox: Any,
    cells: CellSources,
    watch: Callable[[Run], None] | None,
    *,
    vaults: Any = None,
    asked: dict[str, Any] | None = None,
) -> Run:
    """Send a task to every engine and follow it to its end, in a thread.

    Args:
        engines: See `Training`.
        task: See `Training`.
        plan: See `Training`.
        packed: See `Training`.
        outbox: See `Training`.
        cells: See `Training`.
        watch: See `Relay`.
        vaults: Snapshots to go on from; by default the training begins at its beginning.
        asked: See `Run`.
    """
    from nbdist.core.snapshot import Vaults

    run_id = new_run_id()
    ranks = {e.rank: RankState(rank=e.rank, host=e.host, pid=e.pid, device=e.device) for e in engines.records()}
    go_on = vaults is not None
    if go_on:
        vaults.grow(engines.size)
    elif not engines.remote:
        vaults = Vaults(engines.size)
    run = Run(
        run_id,
        plan,
        RunState(title=task.title, plan=plan.to_dict(), ranks=ranks),
        request_stop=lambda: engines.request_stop(run_id),
        vaults=vaults,
        asked=asked,
    )
    Relay(Training(run, engines, task, plan, packed, outbox, cells), go_on=go_on, watch=watch).start()
    return run
