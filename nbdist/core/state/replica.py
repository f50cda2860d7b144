"""A replica that can be resumed from alone: what its ranks save after an error, for those that are lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbdist.core.data.reader import Slice
from nbdist.core.process import rng
from nbdist.core.state.shard_plan import ShardPlan
from nbdist.core.state.train_progress import TrainProgress
from nbdist.core.sync.step_tail import Totals
from nbdist.core.task.task import Task
from nbdist.plan import available_bytes

__all__ = ["Replica", "with_lost_ranks"]

_MEMORY_SHARE = 0.5
"""The part of the free memory that the shares of all ranks may take."""


class Replica:
    """This rank's replica, as `ShardPlan.replicas` has it. Local.

    Args:
        task: What is trained; what it keeps beside weights may differ from rank to rank.
        shard_plan: What this rank saves.
        ranks: How many there are.
    """

    def __init__(self, task: Task, shard_plan: ShardPlan, ranks: int) -> None:
        self._task, self._shard_plan, self._ranks = task, shard_plan, ranks
        self._first_generators = rng.state_dict()

    def of_all_ranks(self, slices: Sequence[Slice], totals: Totals) -> dict[str, Any]:
        """What `TrainProgress.advance` takes of all ranks; empty if no replica can be resumed from alone."""
        if len(self._shard_plan.replicas) == 1:
            return {}
        return {"all_samples": slices[0].batch_samples if slices else None, "all_losses": totals.parts}

    def stands_alone(self, progress: TrainProgress) -> bool:
        """Whether it has all that the others have, and there is memory for a rank's share of it. Waits for a GPU."""
        task, plan = self._task, self._shard_plan
        if len(plan.replicas) == 1 or progress.row.all_samples is None or task.carried.any:
            return False
        read_here = task.data.is_fed or (task.data.dataset is not None and not task.data.loading.get("num_workers"))
        if not read_here and rng.state_dict() != self._first_generators:  # reading seeds them anew in each step
            return False
        share, free = sum(tensor.nbytes for tensor in plan.changing(alone=True).values()), available_bytes()
        return (free is None or share * self._ranks <= free * _MEMORY_SHARE) and plan.stands_alone()

    @property
    def number(self) -> tuple[int, int]:
        """Its number, and how many ranks it has; see `Head`."""
        plan = self._shard_plan
        return 1 + plan.replicas.index(plan.replica), len(plan.replica)

    @property
    def metadata(self) -> dict[str, Any]:
        """What `with_lost_ranks` needs beside each rank's progress, as JSON-able data."""
        return {"ranks": self._ranks, "reporting": self._shard_plan.reporting}


def with_lost_ranks(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metadata of all ranks, from those of one replica. Local.

    The samples and losses of the present row become those of the first rank that reports any. The losses of lost ranks
    are known as ranks have summed them, so that of the row is rounded as gradients are.

    Args:
        ranks: The metadata of each rank of the replica, see `RANK`.
    """
    first, known = ranks[0], {rank["rank"]: rank for rank in ranks}
    position, about = first["position"], first["replica"]
    counts, nothing = position["row"], {"samples": 0, "loss": [0.0, 0.0]}
    whole, reporting = {"samples": counts["all_samples"], "loss": counts["all_losses"]}, about["reporting"]
    return [
        {
            **known.get(rank, first),
            "rank": rank,
            "reports_loss": rank in reporting,
            "position": {**position, "row": {**counts, **(whole if rank == reporting[0] else nothing)}},
        }
        for rank in range(about["ranks"])
    ]
