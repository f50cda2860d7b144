"""Whether a user's after_step(model) can be called, and does the same on every rank."""

from __future__ import annotations

import torch

from nbdist.core.check.muted import muted
from nbdist.core.comm.world import World
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.program_state import ProgramState
from nbdist.core.sync.agreement import raise_on_all
from nbdist.core.task.after_step import AfterStep
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["check_after_step"]


def check_after_step(task: Task, plan: Plan, world: World, *, sent: bool) -> list[str]:
    """Call it twice on rank 0, if there is one, with the same weights. **Collective**.

    Args:
        task: Its model is whole. Nothing is left of the calls.
        plan: Its options.
        world: All ranks.
        sent: Whether the task was sent here, so that what it changes beside the model stays here.

    Returns:
        Notes, on rank 0.

    Raises:
        TaskError: It fails, gives other weights the second time, or trains a tensor that is no part of the model.
    """
    if task.after_step is None or plan.check == "no":
        return []
    notes: list[str] = []
    raise_on_all(_found(task, plan, world.device, sent, notes) if world.rank == 0 else "", world.channel())
    return notes


def _found(task: Task, plan: Plan, device: torch.device, sent: bool, notes: list[str]) -> str:
    """What is wrong, as a sentence; empty if nothing is, or it cannot be called twice. Adds to the notes."""
    state = ProgramState({"model": task.model, "after_step": task.after_step})  # by the names of the model
    if state.iterators or state.excess:
        return ""
    after_step, table, before = AfterStep(task, plan, device), ParamTable.of(task.model), dict[str, torch.Tensor]()
    with muted():
        for _ in range(2):
            try:
                after_step.call(0)
            except Exception as error:
                return f"{plan.after_step}(model), called after each step, fails: {type(error).__name__}: {error}"
            now = {name: tensor.clone() for name, tensor in table.tensors.items()}
            own = {f"model.{name}" for name in table.tensors}
            beside = [path for path in state.written() if path not in own]
            kept = [*dict.fromkeys(path for path in (*beside, *state.changes()) if path not in own)]
            state.restore()
            if beside and sent:
                return (
                    f"{plan.after_step}(model), called after each step, changes {beside[0]}, which is no part of the "
                    "model, so it would stay on the engines: train a dict of both, as in {'net': model, 'ema': ema}, "
                    "which the function then gets; or let nbdist average the weights (--ema 0.999)."
                )
            if kept and not before:
                more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
                notes.append(
                    f"{plan.after_step} changes {kept[0]}{more} beside weights and buffers: each rank has its own, and "
                    "no snapshot or checkpoint has it; keep it in a buffer of the model (a step's number is "
                    "nbdist.current_step())"
                )
            for name in before:
                if not torch.equal(before[name].nan_to_num(), now[name].nan_to_num()):
                    return (
                        f"{plan.after_step}(model), called after each step, gives {name} other values when it is "
                        "called again with the same weights, so ranks would not stay equal: let it depend on the model "
                        "alone, and draw from torch's, NumPy's or Python's global generator."
                    )
            before = now
    return ""
