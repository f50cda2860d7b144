"""Reattach: take over a run that another kernel started."""

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
    """Take over the newest run on engines of an anchor; load its weights if it has ended.

    Afterwards its model is in `namespace` under its name; a model of the same shapes there gets the weights instead.

    Args:
        engines: Where it runs.
        namespace: The notebook's.
        command: See `Run`.
        segment_cache: See `RunDispatch`.
        cells: See `RunDispatch`.

    Returns:
        The dispatch, the handoff, and the paths of the ranks' boards if the run has not ended; None if there was no
        run.

    Raises:
        ClusterError: Its model cannot be unpickled here.
    """
    assert engines.anchor is not None
    notes = engines.anchor.state()["notes"]
    if "run" not in notes:
        return None
    handoff: RunHandoff = notes["run"]
    try:
        task, plan = unpack(handoff.payload)
    except Exception as error:
        raise ClusterError(f"the model of run {handoff.run_id} cannot be unpickled here: {error!r}.") from error
    run = Run(
        handoff.run_id, plan, _recorded(handoff, plan, engines), command, None, handoff.replan, handoff.on_failure
    )
    run.snapshot_store = (
        SnapshotStore(engines.size, engines.anchor, handoff.snapshot_store) if handoff.snapshot_store else None
    )
    name = handoff.names[0] if handoff.names[0].isidentifier() else "model"
    existing = namespace.get(name)
    same_shapes = _have_same_shapes(existing, task.model)
    if not same_shapes:
        namespace[name] = task.model
    segment = Segment(1, engines.anchor, handoff.payload.path)
    into = existing if same_shapes else None
    dispatch = RunDispatch(run, engines, task, plan, (handoff.payload, segment), segment_cache, cells, handoff, into)
    state, error_text = notes["ended"]
    if state == "running":
        return dispatch, handoff, notes["boards"]
    dispatch.load_newest_snapshot()
    run._end(state, EngineError(error_text) if state == "failed" else None)
    run._release()
    return dispatch, handoff, None


def _recorded(handoff: RunHandoff, plan: Plan, engines: Engines) -> RunState:
    """The state of a running run that another kernel started, read from its record."""
    try:
        progress = past_run(handoff.run_id).progress
    except PlanError:  # it has just started, and has no record yet
        progress = RunState(title=handoff.title, plan=plan.to_dict(), ranks={})
    for r in engines.records():
        progress.ranks.setdefault(r.rank, RankState(rank=r.rank, host=r.host, device=r.device))
    progress.state, progress.error, progress.ended_s = "running", "", None
    return progress


def _have_same_shapes(existing: Any, trained: Any) -> bool:
    """Whether a value of the notebook is a model that the trained model's weights fit into."""
    if not isinstance(existing, nn.Module):
        return False
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (existing, trained)]
    return shapes[0] == shapes[1]
