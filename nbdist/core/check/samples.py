"""The samples of a check: the fewest of the first batch that fill every slice, in the ways in which they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nbdist.core.check.findings import CannotBeChecked
from nbdist.core.check.sentences import OTHER_DATA
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.comm.world import World
from nbdist.core.data.feed import Feed, digest
from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import Source, tensors_in
from nbdist.core.data.untouched import untouched
from nbdist.core.params.program_state import ProgramState
from nbdist.core.process import rng
from nbdist.core.sync.sync_batchnorm import BatchNorms
from nbdist.core.task.task import Task
from nbdist.errors import TaskError
from nbdist.plan import Plan, slice_bounds

__all__ = ["Samples", "check_same_val", "read_rows", "read_samples", "read_slice", "synchronizes", "with_head"]

_DATA_BYTES = 2**20
_FEW = 8
_A_PART = (
    "rank {rank} reads other samples of the data than rank 0, each time the same ones: each process takes a part by "
    "its rank (RANK, get_rank, split_by_node), but rank 0 reads for all, and would train on its part alone. Give "
    "every process the whole data: nbdist distributes it."
)


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


def with_head(task: Task, plan: Plan, feed: Feed, own_data: World | None) -> Task:
    """The task with the first samples of data that rank 0 reads for all. **Collective** over the world.

    Args:
        task: Its data is read; it is left as it was.
        plan: Says how a batch is cut.
        feed: From rank 0.
        own_data: The world, where each process made its data by itself (torchrun); else all have the notebook's.

    Raises:
        TaskError: Processes take parts of the data by their rank.
        Exception: What the user's data raises.
    """
    head = feed.share(lambda: _read_head(task, plan))
    if own_data is not None and own_data.size > 1 and (task.data.stream is not None or task.data.ready is not None):
        own = head if feed.is_first else _read_head(task, plan)
        digests = own_data.channel().all_gather(torch.tensor(list(digest(own)), device=own_data.device))
        others = [rank for rank, one in enumerate(digests) if not torch.equal(one, digests[0])]
        if others and feed.share(lambda: digest(_read_head(task, plan)) == digest(head)):
            raise TaskError(_A_PART.format(rank=others[0]))
    return task if head is None else replace(task, data=replace(task.data, head=head))


def check_same_val(task: Task, plan: Plan, world: World, *, apart: bool) -> None:
    """Check that all ranks have the same validation data. **Collective** over the world.

    Args:
        task: Its validation data.
        plan: Its options.
        world: All ranks.
        apart: Whether each process made its data by itself (torchrun); else all have the notebook's.

    Raises:
        TaskError: They have not.
    """
    val = task.val
    if val is None or not apart or val.is_fed or world.size == 1 or plan.check == "no":
        return
    own, again = (_digest_of_first(val, plan) for _ in range(2))
    steady = torch.tensor([*own, own == again], dtype=torch.uint8, device=world.device)
    found = world.channel().all_gather(steady)
    others = [rank for rank, one in enumerate(found) if not torch.equal(one, found[0])]
    if others and all(bool(one[-1]) for one in found):  # else samples are drawn anew each time
        raise TaskError("of val, " + OTHER_DATA.format(rank=others[0]))


def _digest_of_first(source: Source, plan: Plan) -> bytes:
    """The digest of the first samples, and of how many there are; empty ones if they cannot be read. Local."""
    count = min(_FEW, source.samples or 0)
    with rng.fork_rng(torch.device("cpu")):
        rng.seed_all(rng.derive(plan.seed, "check"))
        try:
            return digest([source.samples, read_rows(source, [range(count)])])
        except Exception:  # the first evaluation raises it
            return digest([source.samples])


def _read_head(task: Task, plan: Plan) -> Any:
    """The first samples of what rank 0 reads for all, or keys of them; None if they can be read only once. Local."""
    source, samples = task.data, max(2 * plan.slices + 1, plan.batch_size // plan.slices)
    with rng.fork_rng(torch.device("cpu")):
        rng.seed_all(rng.derive(plan.seed, "check"))
        given = [source.ready, source.stream, source.batch_sampler, source.sampler]
        reads = ProgramState({"data": next(one for one in given if one is not None)}, large_bytes=_DATA_BYTES)
        try:
            with untouched(source) as copied:
                once = copied.ready if copied.ready is not None else copied.stream
                if once is not None and isinstance(once, Iterator) and once is iter(once):
                    return None
                return copied.read_head(samples)
        finally:
            reads.restore()


def read_samples(task: Task, plan: Plan, *, even: bool, all_known: bool = False) -> Samples:
    """Read the samples; the data is left as it was. Local, under its own random numbers.

    Args:
        task: Its data is read.
        plan: Says how a batch is cut.
        even: Whether all slices have the same size; else the first has a sample more, as in a last batch.
        all_known: Whether to read the whole first batch, as far as it is known; else as few as possible.

    Raises:
        CannotBeChecked: There are too few, or they cannot be read twice.
    """
    samples = _known(task, plan) if all_known else min(_known(task, plan), 2 * plan.slices + (not even))
    bounds = slice_bounds(samples, plan.slices)
    if bounds[-1][0] == bounds[-1][1]:
        raise CannotBeChecked("there are fewer samples than slices")
    rng.seed_all(rng.derive(plan.seed, "check"))
    cuts = [range(*pair) for pair in bounds]
    together = _synchronized(task, plan, cuts)
    batches = read_rows(task.data, [*cuts, range(samples), *together])
    slices = _slices_of(cuts, batches, plan)
    joined = _slices_of(together, batches[len(cuts) + 1 :], plan)
    return Samples(
        whole=Slice(index=0, samples=samples, batch=batches[len(cuts)]),
        slices=slices,
        replicas=[joined] if joined else _replicas(slices, plan),
    )


def read_slice(task: Task, plan: Plan, rank: int) -> Slice:
    """Read the first slice of a rank in the first batch, in full. See `read_samples`."""
    samples = _known(task, plan)
    rng.seed_all(rng.derive(plan.seed, "check"))
    first = ReductionTree.share(plan.slices, plan.mesh.data_places[rank], plan.mesh.data)[0]
    rows = range(*slice_bounds(samples, plan.slices)[first])
    return replace(_slices_of([rows], read_rows(task.data, [rows]), plan)[0], index=first, batch_samples=samples)


def _known(task: Task, plan: Plan) -> int:
    """How many samples of the first batch can be read."""
    if task.data.head is not None:
        known = task.data.head_samples
        return known if task.data.sets_batches else min(plan.batch_size, known)
    return min(plan.batch_size, task.data.samples or plan.batch_size)


def read_rows(source: Source, rows: list[Any]) -> list[Any]:
    """The batches of some samples; the data is left as it was. Local.

    Raises:
        CannotBeChecked: They cannot be read twice.
    """
    reads = ProgramState({"data": source.given}, large_bytes=_DATA_BYTES)
    try:
        batches = source.batches(rows)
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
