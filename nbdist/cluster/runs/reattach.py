"""How a run that another kernel has begun is taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.dispatch import Training
from nbdist.cluster.runs.run import Begun, Run
from nbdist.core.state.snapshot import Vaults
from nbdist.core.transfer.payload import Segment, unpack
from nbdist.engine.cell_sources import CellSources
from nbdist.errors import ClusterError, EngineError, PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RankState, RunState, past_run

__all__ = ["take_over"]


def take_over(
    engines: Engines, namespace: dict[str, Any], order: Callable[[Run, str, Any], None], outbox: Any, cells: CellSources
) -> tuple[Training, Begun, list[str] | None] | None:
    """Take over the newest run on engines of an anchor, and bring its weights home if it has ended.

    Its model stands in `namespace` afterwards, under its name; where one like it is there, that gets the weights.

    Args:
        engines: Where it runs.
        namespace: The notebook's.
        order: See `Run`.
        outbox: See `Training`.
        cells: See `Training`.

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
    begun: Begun = notes["run"]
    try:
        task, plan = unpack(begun.parcel)
    except Exception as error:
        raise ClusterError(f"the model of run {begun.run_id} cannot be made here: {error!r}.") from error
    run = Run(begun.run_id, plan, _recorded(begun, plan, engines), order, None, begun.replan, begun.on_failure)
    run.vaults = Vaults(engines.size, engines.anchor, begun.vaults) if begun.vaults else None
    name = begun.names[0] if begun.names[0].isidentifier() else "model"
    mine = namespace.get(name)
    like = _alike(mine, task.model)
    if not like:
        namespace[name] = task.model
    segment = Segment(1, engines.anchor, begun.parcel.path)
    into = mine if like else None
    training = Training(run, engines, task, plan, (begun.parcel, segment), outbox, cells, begun, into)
    state, why = notes["ended"]
    if state == "running":
        return training, begun, notes["boards"]
    training.rescue()
    run._end(state, EngineError(why) if state == "failed" else None)
    run._release()
    return training, begun, None


def _recorded(begun: Begun, plan: Plan, engines: Engines) -> RunState:
    """What the record says of a run that another kernel has begun, as of one that goes on."""
    try:
        progress = past_run(begun.run_id).progress
    except PlanError:  # it has only just begun
        progress = RunState(title=begun.title, plan=plan.to_dict(), ranks={})
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
