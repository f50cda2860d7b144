"""Whether a step that carries values from batch to batch can go on to an epoch's last batch, if that is smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nbdist.core.check.findings import CannotBeChecked
from nbdist.core.check.muted import muted
from nbdist.core.check.plain_step import PlainStep
from nbdist.core.check.samples import read_rows
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.data.sources import Source
from nbdist.core.params.program_state import ProgramState
from nbdist.core.process import rng
from nbdist.core.process.memory import is_out_of_memory
from nbdist.core.sync.agreement import raise_on_all
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.task.task import Task
from nbdist.errors import NbdistError
from nbdist.plan import Plan, slice_bounds

__all__ = ["check_short_batch"]


def check_short_batch(task: Task, plan: Plan, world: World, hooks: GradientHooks) -> None:
    """Run the step on a slice, and then on as few samples as that batch would give it, on rank 0. **Collective**.

    What is carried may have a row for each sample; whether it has, only the step knows.

    Args:
        task: Its model is whole. Nothing is left of the steps. Data whose batches are known only when they are read is
            left out.
        plan: Says how a batch is cut.
        world: All ranks.
        hooks: The user's gradient hooks.

    Raises:
        TaskError: The step cannot go on from the one to the other.
    """
    if not task.carried.declared or plan.check == "no":
        return
    found = ""
    if world.rank == 0:
        with contextlib.suppress(CannotBeChecked), rng.fork_rng(world.device), muted():
            found = _found(task, plan, world, hooks)
    raise_on_all(found, world.channel())


def _found(task: Task, plan: Plan, world: World, hooks: GradientHooks) -> str:
    """What is wrong, as a sentence; empty if nothing is, or it cannot be found out."""
    roots = {"model": task.model, "step": task.own_step}
    step = PlainStep(task, plan, hooks, lambda: ProgramState(roots), world.device, forward_only=True)
    if step.state.iterators or step.state.excess:
        return ""
    for source, full, short in _short_slices(task, plan):
        rng.seed_all(rng.derive(plan.seed, "check"))
        cuts = [range(full), range(short)]
        slices = [
            Slice(index=0, samples=len(cut), batch=batch, of=plan.slices, batch_samples=plan.batch_size)
            for cut, batch in zip(cuts, read_rows(source, cuts), strict=True)
        ]
        try:
            step.carry(slices[:1])
        except Exception:  # the first step raises it
            return ""
        try:
            step.carry(slices)
        except NbdistError as error:
            return str(error)
        except Exception as error:
            if is_out_of_memory(error):
                return ""
            what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
            return (
                f"the last batch of an epoch gives the step {short} samples where the others give {full}, and with the "
                f"values that it carries from batch to batch it fails on them ({what}): drop that batch (a loader's "
                "drop_last=True), or choose a batch size that divides the samples."
            )
    return ""


def _short_slices(task: Task, plan: Plan) -> Iterator[tuple[Source, int, int]]:
    """Data with such a batch, and the samples of a slice in the others and in this one."""
    measured = [] if task.val is None or task.evaluate is not None else [task.val]
    for source in (task.data, *measured):
        of_data, size = source is task.data, source.batch_size or plan.batch_size
        slices = plan.slices if of_data else plan.reproducible or plan.mesh.data
        samples = None if source.is_fed or source.drop_last else source.samples
        if samples is None or samples < size or not samples % size:
            continue
        if of_data and plan.steps is not None and plan.steps <= samples // size:
            continue  # the run ends before it
        bounds = zip(slice_bounds(size, slices), slice_bounds(samples % size, slices), strict=True)
        pairs = [(stop - start, last - first) for (start, stop), (first, last) in bounds]
        if found := next((pair for pair in pairs if pair[1] not in (0, pair[0])), None):
            yield source, *found
