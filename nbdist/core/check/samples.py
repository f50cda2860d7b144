"""The samples of a check: the fewest of the first batch that fill every slice, in the ways in which they are needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from nbdist.core.check.findings import CannotBeChecked
from nbdist.core.check.program_state import ProgramState
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import tensors_in
from nbdist.core.process import rng
from nbdist.core.sync.sync_batchnorm import BatchNorms
from nbdist.core.task.task import Task
from nbdist.plan import Plan, slice_bounds

__all__ = ["Samples", "read_samples", "read_slice", "synchronizes"]

_DATA_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a check.

    Args:
        whole: All in one slice.
        slices: As the plan cuts them.
        replicas: What each replica runs. Where BatchNorm layers synchronize, a single one with larger slices: those of
            which the statistics are taken together.
    """

    whole: Slice
    slices: list[Slice]
    replicas: list[list[Slice]]

    @property
    def digest(self) -> bytes:
        """A digest of the tensors in them."""
        made = hashlib.blake2b(digest_size=16)
        for tensor in tensors_in(self.whole.batch):
            dense = tensor.detach().cpu().to_dense().resolve_conj().resolve_neg().contiguous()
            made.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        return made.digest()


def read_samples(task: Task, plan: Plan, *, even: bool) -> Samples:
    """Read the samples; the data is left as it was. Local, under its own random numbers.

    Args:
        task: Its data is read.
        plan: Says how a batch is cut.
        even: Whether all slices have the same size; else the first has a sample more, as in a last batch.

    Raises:
        CannotBeChecked: There are too few, or they cannot be read twice.
    """
    samples = min(plan.batch_size, 2 * plan.slices + (not even), task.data.samples or plan.batch_size)
    bounds = slice_bounds(samples, plan.slices)
    if bounds[-1][0] == bounds[-1][1]:
        raise CannotBeChecked("there are fewer samples than slices")
    rng.seed_all(rng.derive(plan.seed, "check"))
    cuts = [range(*pair) for pair in bounds]
    together = _synchronized(task, plan, cuts)
    batches = _read(task, [*cuts, range(samples), *together])
    slices = _slices_of(cuts, batches, plan)
    joined = _slices_of(together, batches[len(cuts) + 1 :], plan)
    return Samples(
        whole=Slice(index=0, samples=samples, batch=batches[len(cuts)]),
        slices=slices,
        replicas=[joined] if joined else _replicas(slices, plan),
    )


def read_slice(task: Task, plan: Plan, rank: int) -> Slice:
    """Read the first slice of a rank in the first batch, in full. See `read_samples`."""
    samples = min(plan.batch_size, task.data.samples or plan.batch_size)
    rng.seed_all(rng.derive(plan.seed, "check"))
    place = next(group.index(rank) for group in plan.mesh.groups("shard", "dp") if rank in group)
    first = ReductionTree.share(plan.slices, place, plan.mesh.data)[0]
    rows = range(*slice_bounds(samples, plan.slices)[first])
    return replace(_slices_of([rows], _read(task, [rows]), plan)[0], index=first, batch_samples=samples)


def _read(task: Task, rows: list[Any]) -> list[Any]:
    """The batches of some samples."""
    reads = ProgramState({"data": task.data.dataset or task.data.stream}, large_bytes=_DATA_BYTES)
    try:
        batches = task.data.batches(rows)
    finally:
        reads.restore()
    if reads.excess:
        raise CannotBeChecked(f"the data holds too many objects to put back, such as {reads.excess}")
    if batches is None:
        raise CannotBeChecked("the data can be read only once")
    return batches


def synchronizes(task: Task, plan: Plan) -> bool:
    """Whether BatchNorm layers take statistics over ranks. Local."""
    return plan.sync_batchnorm and plan.mesh.data > 1 and bool(BatchNorms.layers_of(task.model))


def _synchronized(task: Task, plan: Plan, cuts: list[range]) -> list[list[int]]:
    """The samples whose statistics BatchNorm takes together: those of a microbatch on all ranks. Else none."""
    if not synchronizes(task, plan):
        return []
    each = len(cuts) // plan.mesh.data
    return [[i for cut in cuts[k::each] for i in cut] for k in range(each)]


def _slices_of(rows: list[Any], batches: list[Any], plan: Plan) -> list[Slice]:
    total = sum(map(len, rows))
    return [
        Slice(index=i, samples=len(part), batch=batch, of=plan.slices, batch_samples=total)
        for i, (part, batch) in enumerate(zip(rows, batches, strict=False))
    ]


def _replicas(slices: list[Slice], plan: Plan) -> list[list[Slice]]:
    if plan.reproducible:
        return [[part] for part in slices]
    size = plan.mesh.data
    return [[slices[i] for i in ReductionTree.share(len(slices), rank, size)] for rank in range(size)]
