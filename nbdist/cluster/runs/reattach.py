"""How a run that another kernel has begun is taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.run import Run, RunHandoff
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.transfer.payload import Segment, unpack
from nbdist.engine.cell_sources import CellSources
from nbdist.errors import ClusterError, EngineError, PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RankState, RunState, past_run

__all__ = ["take_over"]


def take_over(
    engines: Engines,
    namespace: dict[str, Any],
    command: Callable[[Run, str, Any], None],
    segment_cache: Any,
    cells: CellSources,
) -> tuple[RunDispatch, RunHandoff, list[str] | None] | None:
    """Take over the newest run on engines of an anchor, and bring its weights home if it has ended.

    Its model stands in `namespace` afterwards, under its name; where one like it is there, that gets the weights.

    Args:
        engines: Where it runs.
        namespace: The notebook's.
        command: See `Run`.
        segment_cache: See `RunDispatch`.
        cells: See `RunDispatch`.

    Returns:
        The training, what was known of it, and the boards of its ranks if they have not told how it ended; None where
        there was no run.

    Raises:
        ClusterError: Its model cannot be made here.
    """
    assert engines.anchor is not None
    notes = engines.anchor.look()["notes"]
    if "run" not in notes:
        return None
    handoff: RunHandoff = notes["run"]
    try:
        task, plan = unpack(handoff.payload)
    except Exception as error:
        raise ClusterError(f"the model of run {handoff.run_id} cannot be made here: {error!r}.") from error
    run = Run(
        handoff.run_id, plan, _recorded(handoff, plan, engines), command, None, handoff.replan, handoff.on_failure
    )
    run.snapshot_store = (
        SnapshotStore(engines.size, engines.anchor, handoff.snapshot_store) if handoff.snapshot_store else None
    )
    name = handoff.names[0] if handoff.names[0].isidentifier() else "model"
    mine = namespace.get(name)
    like = _alike(mine, task.model)
    if not like:
        namespace[name] = task.model
    segment = Segment(1, engines.anchor, handoff.payload.path)
    into = mine if like else None
    dispatch = RunDispatch(run, engines, task, plan, (handoff.payload, segment), segment_cache, cells, handoff, into)
    state, why = notes["ended"]
    if state == "running":
        return dispatch, handoff, notes["boards"]
    dispatch.rescue()
    run._end(state, EngineError(why) if state == "failed" else None)
    run._release()
    return dispatch, handoff, None


def _recorded(handoff: RunHandoff, plan: Plan, engines: Engines) -> RunState:
    """What the record says of a run that another kernel has begun, as of one that goes on."""
    try:
        progress = past_run(handoff.run_id).progress
    except PlanError:  # it has only just begun
        progress = RunState(title=handoff.title, plan=plan.to_dict(), ranks={})
    for r in engines.records():
        progress.ranks.setdefault(r.rank, RankState(rank=r.rank, host=r.host, device=r.device))
    progress.state, progress.error, progress.ended_s = "running", "", None
    return progress


def _alike(mine: Any, theirs: Any) -> bool:
    """Whether a model of the notebook can take the weights of another one."""
    if not isinstance(mine, nn.Module):
        return False
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (mine, theirs)]
    return shapes[0] == shapes[1]
