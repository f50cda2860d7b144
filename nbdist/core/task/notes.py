"""What is noted about a task where a run begins: what may be meant, but often is not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nbdist.core.task.own_loop import outside_modules
from nbdist.core.task.task import Task

__all__ = ["notes_on_modes", "notes_on_optimizers", "notes_on_outside", "outside_parameters"]


def notes_on_modes(task: Task) -> list[str]:
    """That a model is in evaluation mode. Local; before it is put in training mode."""
    return [
        f"{name or 'the model'} was given in evaluation mode, and is trained in training mode, with dropout and the "
        "statistics of each batch: where layers are to stay in evaluation mode, call train() on it, and eval() on them"
        for name, module in task.modules.items()
        if not module.training and any(True for _ in module.parameters())
    ]


def notes_on_optimizers(task: Task) -> list[str]:
    """That parameters are in no optimizer, or that nothing changes at a learning rate of zero. Local."""
    if not task.own_optimizers:
        return []
    groups = [group for optimizer in task.optimizers.values() for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    left = [name for name, p in task.model.named_parameters() if p.requires_grad and id(p) not in held]
    notes = []
    if left and task.after_step is None:  # which may write them, as an average is written
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        notes.append(f"no optimizer holds {left[0]}{more}, so they are not trained: freeze them, or give them to it")
    if not task.schedulers and all(float(group.get("lr", 1.0)) == 0.0 for group in groups):
        notes.append("the learning rate is 0, so nothing is trained")
    return notes


def outside_parameters(task: Task) -> dict[str, nn.Parameter]:
    """The parameters of modules that a step uses beside the model, which have no gradients yet, by name. Local."""
    modules = outside_modules(task.own_step, task.model)
    every = {f"{name}.{path}": p for name, module in modules.items() for path, p in module.named_parameters()}
    return {path: p for path, p in every.items() if p.requires_grad and p.grad is None}


def notes_on_outside(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """That parameters beside the model have got gradients, which no optimizer of the run uses. Local; after a step."""
    found = [path for path, parameter in parameters.items() if parameter.grad is not None]
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [
        f"the step computes gradients of {found[0]}{more}, but only the model is trained: make it a part of the model "
        "(a module that holds both), or compute it in `with torch.no_grad():`"
    ]
