"""Reattach: take over a run that another kernel started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.host_snapshots import HostSnapshots
from nbdist.cluster.runs.run_control import GiveCommand, RunControl
from nbdist.cluster.runs.run_spec import RunHandoff, RunSpec
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.transfer.payload import Segment, unpack
from nbdist.engine.follow.changes import NotebookChanges
from nbdist.errors import ClusterError, EngineError, PlanError
from nbdist.telemetry import RankState, RunState, past_run

__all__ = ["take_over"]


def take_over(
    engines: Engines,
    namespace: dict[str, Any],
    give_command: GiveCommand,
    segment_cache: Any,
    changes: NotebookChanges,
) -> tuple[RunDispatch, list[str] | None] | None:
    """Take over the newest run on engines of an anchor; load its weights if it has ended.

    Afterwards its model is in `namespace` under its name; a model of the same shapes there gets the weights instead.

    Args:
        engines: Where it runs.
        namespace: The notebook's.
        give_command: See `RunControl`.
        segment_cache: See `RunDispatch`.
        changes: See `RunDispatch`.

    Returns:
        The dispatch, and the paths of the ranks' boards if the run has not ended; None if there was no run.

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
        raise ClusterError(f"the model of run {handoff.spec.run_id} cannot be unpickled here: {error!r}.") from error
    spec = replace(handoff.spec, task=task, plan=plan)
    control = RunControl(spec, _recorded(spec, engines), give_command)
    if handoff.snapshot_paths:
        paths = handoff.snapshot_paths
        control.keep_snapshots(
            SnapshotStore(engines.size, engines.anchor, paths)
            if engines.share_memory
            else HostSnapshots(engines, paths, handoff.elsewhere)
        )
    name = spec.names[0] if spec.names[0].isidentifier() else "model"
    existing = namespace.get(name)
    same_shapes = _have_same_shapes(existing, task.model)
    if not same_shapes:
        namespace[name] = task.given
    segment = Segment(1, engines.anchor, handoff.payload.path)
    into = existing if same_shapes else None
    packed = handoff.payload, segment
    dispatch = RunDispatch(control, engines, segment_cache, changes, changes.count, packed=packed, into=into)
    state, error_text = notes["ended"]
    if state == "running":
        return dispatch, notes["boards"]
    dispatch.load_newest_snapshot()
    control.end(state, EngineError(error_text) if state == "failed" else None)
    control.release()
    return dispatch, None


def _recorded(spec: RunSpec, engines: Engines) -> RunState:
    """The state of a running run that another kernel started, read from its record."""
    try:
        progress = past_run(spec.run_id).progress
    except PlanError:  # it has just started, and has no record yet
        progress = RunState(title=spec.title, plan=spec.plan.to_dict(), ranks={})
    for r in engines.records():
        progress.ranks.setdefault(r.rank, RankState(rank=r.rank, host=r.host, device=r.device))
    progress.reopen()
    return progress


def _have_same_shapes(existing: Any, trained: Any) -> bool:
    """Whether a value of the notebook is a model that the trained model's weights fit into."""
    if not isinstance(existing, nn.Module):
        return False
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (existing, trained)]
    return shapes[0] == shapes[1]
