"""Rehearsal: a run of two steps with all that belongs to it, which leaves nothing, and says what the run would take."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nbdist.core.comm.world import World
from nbdist.core.control.commands import Commands
from nbdist.core.data.excerpt import Excerpt
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.program_state import ProgramState
from nbdist.core.process.memory import PeakMemory
from nbdist.core.result import Result
from nbdist.core.sync.agreement import raise_on_all
from nbdist.core.task.each_epoch import EpochHook
from nbdist.core.task.task import Task
from nbdist.core.train import fit
from nbdist.plan import Plan, available_bytes
from nbdist.telemetry import Checkpointed, EpochFinished, Evaluating, Event, Noted, RunFinished, Sink
from nbdist.telemetry.units import duration, size, span

__all__ = ["rehearse"]

_STEPS = 2


def rehearse(
    task: Task, plan: Plan, world: World, *, run_id: str = "", sinks: Sequence[Sink] = (),
    commands: Commands | None = None, on_every_rank: bool = True, epoch_hook: EpochHook | None = None,
) -> Result:  # fmt: skip
    """Run two steps, an evaluation, each hook, a checkpoint and its resume; put all back. **Collective**.

    Batches have their full size, so time and memory are those of the run. What fails raises as in the run. At the end
    notes say what was rehearsed, and what the run is expected to take.

    Args:
        task: Model, optimizers and what the step keeps in Python are afterwards as they were.
        plan: Of the run; it is rehearsed from the first step, even if it resumes.
        world: The ranks.
        run_id: See `fit`.
        sinks: See `fit`.
        commands: See `fit`.
        on_every_rank: See `fit`.
        epoch_hook: See `fit`.

    Raises:
        TaskError: The checkpoint does not hold what was trained; or anything that `fit` raises.
    """
    steps, batches = Excerpt(_STEPS, world.device), Excerpt(_STEPS, world.device)
    watch = _Watch(sinks)
    own = task.named("model", "data")
    # The model of a callable is built for the run, and too large to be kept twice.
    left_out = {"the task", *(("model", "optimizer") if task.in_file else ())}
    before = ProgramState({name: value for name, value in own.items() if name not in left_out})
    peak = PeakMemory(world.device)
    options: dict[str, Any] = {
        "run_id": run_id, "sinks": [watch], "commands": commands, "on_every_rank": on_every_rank,
        "excerpts": (steps, batches),
    }  # fmt: skip
    try:
        with _folder(plan, world, run_id) as folder:
            short = replace(
                plan, checkpoint=folder, checkpoint_every="", resume="", tensorboard="", early_stop="",
                epochs=plan.epochs and 1, steps=plan.steps and min(plan.steps, _STEPS),
            )  # fmt: skip
            result = fit(task, short, world, epoch_hook=epoch_hook, **options)
            if result.state == "finished":
                memory = _memory(world, peak.nbytes - before.nbytes)
                held = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
                _resume(task, replace(short, resume=folder, checkpoint="", check="no"), world, before, options)
    finally:
        before.restore()
    if result.state == "finished" and world.rank == 0:
        for text in (_rehearsed(plan, steps, batches, held), _expected(task, plan, steps, batches, watch), memory):
            watch.tell(Noted(rank=0, text=text))
    watch.tell(RunFinished(rank=world.rank, state=result.state))
    return replace(result, average={})


def _resume(task: Task, plan: Plan, world: World, before: ProgramState, options: dict[str, Any]) -> None:
    """Resume after the last step, which trains nothing, and compare what was loaded. **Collective**."""
    whole = plan.gather and not task.in_file and (options["on_every_rank"] or world.rank == 0)
    other_weights = any(hasattr(optimizer, "eval") for optimizer in task.optimizers.values())  # computed once more
    trained = {}
    if whole and not other_weights:
        trained = {name: tensor.clone() for name, tensor in ParamTable.of(task.model).tensors.items()}
    before.restore()
    fit(task, plan, world, epoch_hook=_NoHook(), **options)
    lost = ""
    for name, tensor in ParamTable.of(task.model).tensors.items() if trained else ():
        if name not in trained or not torch.equal(trained[name].nan_to_num(), tensor.nan_to_num()):
            lost = f"{name} has other values after a resume than when its checkpoint was written: report it, please."
    raise_on_all(lost, world.channel())


class _NoHook(EpochHook):
    """For a run that begins after its last step."""

    def begin(self, state: Any) -> None:
        """Nothing is called."""

    def answer(self, number: int) -> str | None:
        """Nothing ends the run."""
        return ""


class _Watch(Sink):
    """Passes events on, but for ends of runs, and notes when they came.

    Args:
        sinks: Of the run.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self.evaluation_s = self.hook_s = self.checkpoint_s = 0.0
        self._evaluating_s: float | None = None

    def emit(self, event: Event) -> None:
        """See `Sink`."""
        now_s = time.perf_counter()
        if isinstance(event, Evaluating):
            self._evaluating_s = now_s
        elif isinstance(event, EpochFinished) and self._evaluating_s is not None:
            self.evaluation_s, self._evaluating_s = now_s - self._evaluating_s, None
        elif isinstance(event, Checkpointed) and not self.checkpoint_s:
            self.checkpoint_s = event.seconds
            if self._evaluating_s is not None:  # the hook's, after which the checkpoint began
                self.hook_s = max(0.0, now_s - self._evaluating_s - event.seconds)
        if not isinstance(event, RunFinished):
            self.tell(event)

    def tell(self, event: Event) -> None:
        """Pass an event on."""
        for sink in self._sinks:
            sink.emit(event)


@contextlib.contextmanager
def _folder(plan: Plan, world: World, run_id: str) -> Iterator[str]:
    """A folder for a checkpoint, in that of the run if it has one; removed at the end. **Collective**."""
    made, folder = "", ""
    if world.rank == 0 and plan.checkpoint:
        made = next((str(p) for p in reversed([Path(plan.checkpoint), *Path(plan.checkpoint).parents])
                     if not p.exists()), "")  # fmt: skip
        folder = os.path.join(plan.checkpoint, f"rehearsal-{run_id}")
    elif world.rank == 0:
        folder = made = tempfile.mkdtemp(prefix="nbdist-rehearsal-")
    folder = world.channel().broadcast_bytes(folder.encode()).decode()
    try:
        yield folder
    finally:
        if world.rank == 0:
            shutil.rmtree(made or folder, ignore_errors=True)


def _rehearsed(plan: Plan, steps: Excerpt, batches: Excerpt, held: int) -> str:
    """What was rehearsed."""
    parts = [f"{len(steps.computing_s)} steps"]
    if batches.computing_s:
        parts.append(f"an evaluation of {len(batches.computing_s)} batches")
    parts += [f"{name} ({getattr(plan, name)})" for name in ("after_step", "each_epoch") if getattr(plan, name)]
    return f"rehearsed: {', '.join(parts)}, a checkpoint ({size(held)}) and its resume; all is as before"


def _expected(task: Task, plan: Plan, steps: Excerpt, batches: Excerpt, watch: _Watch) -> str:
    """How long things take, and the run."""
    reading = steps.reading_s[-1]  # the first one warms up
    step_s, evaluation_s = reading + steps.computing_s[-1], 0.0
    parts = [f"a step takes {span(step_s)}, of which reading {span(reading)}"]
    if task.val is not None and batches.computing_s:
        each_s = batches.reading_s[-1] + batches.computing_s[-1]
        once_s = max(0.0, watch.evaluation_s - sum(batches.reading_s) - sum(batches.computing_s))
        number = task.val.steps(task.val.batch_size or plan.batch_size) or 1
        evaluation_s = once_s + number * each_s
        parts.append(f"an evaluation of {number} batches {span(evaluation_s)}")
    if watch.hook_s:
        parts.append(f"{plan.each_epoch} {span(watch.hook_s)}")
    text = ", ".join([*parts, f"a checkpoint {span(watch.checkpoint_s)}"])
    in_epoch = task.data.steps(plan.batch_size)
    if plan.epochs is None:
        total, whole = plan.steps or 0, f"{plan.steps} steps"
    elif in_epoch is None:
        return f"{text}; how many steps an epoch has is not known"
    else:
        total, whole = in_epoch * plan.epochs, f"{plan.epochs} epoch{'s' * (plan.epochs > 1)} of {in_epoch} steps"
    seconds = total * step_s + (plan.epochs or 1) * (evaluation_s + watch.hook_s)
    return f"{text}: {whole} take about {duration(seconds + watch.checkpoint_s * bool(plan.checkpoint))}"


def _memory(world: World, own: int) -> str:
    """What the rank with most memory has needed. **Collective**."""
    most = torch.stack(world.channel().all_gather(torch.tensor([float(own)], device=world.device))).max().item()
    free = None if world.device.type == "cuda" else available_bytes()
    return f"memory: a rank needs up to {size(most)}" + ("" if free is None else f", and {size(free)} are free besides")
