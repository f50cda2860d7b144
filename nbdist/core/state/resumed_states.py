"""The saved states from which a run resumes: a checkpoint, a snapshot, or one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbdist.core.comm.world import World
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import checkpoint_of_run, folder_to_resume
from nbdist.core.state.restore import open_on_all_ranks
from nbdist.core.state.shard_plan import gather_texts
from nbdist.errors import PlanError
from nbdist.plan import Plan

__all__ = ["resumed_states"]


def resumed_states(
    plan: Plan, world: World, snapshot_paths: Sequence[Sequence[str]], run_id: str, from_snapshot: bool
) -> Iterator[CheckpointReader]:
    """The states to load, the same on all ranks: a checkpoint, then a snapshot (without what has not changed since).

    Without a snapshot of this run, the checkpoint is its own last one, if it has written any. **Collective**.
    """
    snapshot = CheckpointReader.of_snapshot(snapshot_paths) if from_snapshot else None
    if from_snapshot:  # each host has its own copies
        steps = {*gather_texts("none" if snapshot is None else str(snapshot.step), world.channel())}
        if len(steps) > 1:
            raise PlanError(f"the ranks have snapshots of different steps ({', '.join(sorted(steps))}): start again.")
    if plan.resume or (from_snapshot and plan.checkpoint):
        folder = ""
        if world.rank == 0:
            own = from_snapshot and snapshot is None and checkpoint_of_run(plan, run_id) is not None
            folder = plan.checkpoint if own else folder_to_resume(plan) if plan.resume else ""
        folder = world.channel().broadcast_bytes(folder.encode()).decode()
        if folder:
            yield open_on_all_ranks(folder, world)
    if snapshot is not None:
        yield snapshot
