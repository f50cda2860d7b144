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


def check_after_step(task: Task, plan: Plan, world: World) -> None:
    """Call it twice on rank 0, if there is one, with the same weights. **Collective**.

    Args:
        task: Its model is whole. Nothing is left of the calls.
        plan: Its options.
        world: All ranks.

    Raises:
        TaskError: It fails, or gives other weights the second time.
    """
    if task.after_step is None or plan.check == "no":
        return
    raise_on_all(_found(task, plan, world.device) if world.rank == 0 else "", world.channel())


def _found(task: Task, plan: Plan, device: torch.device) -> str:
    """What is wrong, as a sentence; empty if nothing is, or it cannot be called twice."""
    state = ProgramState({"after_step": task.after_step, "model": task.model})
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
            state.restore()
            for name in before:
                if not torch.equal(before[name].nan_to_num(), now[name].nan_to_num()):
                    return (
                        f"{plan.after_step}(model), called after each step, gives {name} other values when it is "
                        "called again with the same weights, so ranks would not stay equal: let it depend on the model "
                        "alone, and draw from torch's, NumPy's or Python's global generator."
                    )
            before = now
    return ""
