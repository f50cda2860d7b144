"""Optimizers by name (adamw, sgd, ...), from a callable or ready-made; whether a mesh may shard their parameters."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nbdist.core.optim.closures import needs_closure, step_alone
from nbdist.core.optim.shardability import differs
from nbdist.core.process.lazy_dynamo import skip_dynamo_import
from nbdist.errors import PlanError, TaskError, suggest
from nbdist.plan import Mesh

__all__ = [
    "ELEMENTWISE", "OPTIMIZERS", "check_can_be_sharded", "is_ready_made", "make_optimizer", "make_optimizers",
    "optimizer_name", "step_optimizers",
]  # fmt: skip

_UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}  # abstract; needs a closure; needs sparse gradients

_FUSED = {"adam", "adamw", "sgd"}  # one kernel for the whole update, on CPU and GPU alike

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in _UNFIT
}
"""The classes of ``torch.optim`` by the names that ``--optimizer`` takes."""

ELEMENTWISE = {
    OPTIMIZERS[name]
    for name in ("adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd")
}
"""Element-wise optimizers, whatever their settings: they need no trial, which takes 50 ms."""


def make_optimizers(optimizer: Any, model: nn.Module, lr: float | None) -> dict[str, torch.optim.Optimizer]:
    """Build the optimizers of `model` by name; the name of an only one is empty.

    Args:
        optimizer: See `make_optimizer`; or a dict of several by name, of which each that is not ready-made gets the
            parameters of the module of that name; or a list or tuple, where names are "0", "1" and so on.
        model: The module.
        lr: See `make_optimizer`.

    Raises:
        TaskError: See `make_optimizer`; or the dict has no module for a name.
        PlanError: See `make_optimizer`.
    """
    if isinstance(optimizer, (list, tuple)):
        optimizer = {str(number): one for number, one in enumerate(optimizer)}
    if not isinstance(optimizer, Mapping):
        return {"": make_optimizer(optimizer, model, lr)}
    if not optimizer or not all(isinstance(name, str) and name for name in optimizer):
        raise TaskError(
            f"optimizer is a dict with the keys {list(optimizer)}: give each a name, by which nbdist.update calls it."
        )
    modules, made = dict(model.named_children()), dict[str, torch.optim.Optimizer]()
    for name, one in optimizer.items():
        ready = isinstance(one, torch.optim.Optimizer)
        if not ready and name not in modules:
            raise TaskError(
                f"optimizer {name} is given as {optimizer_name(one)}, and the model has no module {name} whose "
                f"parameters it could take: give a ready-made optimizer.{suggest(name, modules)}"
            )
        made[name] = make_optimizer(one, model if ready else modules[name], lr)
    return made


def is_ready_made(optimizer: Any) -> bool:
    """Whether the user made an optimizer, or one of a dict of them."""
    several = isinstance(optimizer, (list, tuple))
    ones = optimizer.values() if isinstance(optimizer, Mapping) else optimizer if several else [optimizer]
    return any(isinstance(one, torch.optim.Optimizer) for one in ones)


def make_optimizer(optimizer: Any, model: nn.Module, lr: float | None) -> torch.optim.Optimizer:
    """Build the optimizer of `model`.

    Args:
        optimizer: A name, a callable that takes the parameters (and `lr`, if it has such an argument), or a
            ready-made optimizer over parameters of `model`.
        model: The module.
        lr: Learning rate; None for the optimizer's default.

    Raises:
        TaskError: The name is unknown, or the value is not, or does not make, an optimizer of this model.
        PlanError: The learning rate is not a positive number.
    """
    if lr is not None and not (isinstance(lr, numbers.Real) and math.isfinite(lr) and lr > 0):
        raise PlanError(f"lr {lr} must be a positive number.")
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {} if lr is None else {"lr": lr}
    if isinstance(optimizer, torch.optim.Optimizer):
        if settings:
            raise TaskError(f"lr={lr} is given, but the optimizer is ready-made: set the rate in it.")
        return _checked(optimizer, model, optimizer)
    if isinstance(optimizer, str):
        if optimizer.lower() not in OPTIMIZERS:
            known = ", ".join(sorted(OPTIMIZERS))
            raise TaskError(
                f"unknown optimizer {optimizer!r}: use {known}, or a callable.{suggest(optimizer.lower(), OPTIMIZERS)}"
            )
        try:
            if optimizer.lower() in _FUSED and all(p.is_floating_point() for p in trainable):
                settings["fused"] = True
            with skip_dynamo_import():
                return OPTIMIZERS[optimizer.lower()](trainable, **settings)
        except ValueError as error:  # muon, which takes matrices only
            raise TaskError(f"optimizer {optimizer} cannot train this model: {error}.") from None
    if not callable(optimizer):
        raise TaskError(f"optimizer must be a name, a callable or an optimizer, not {optimizer!r}.")
    if settings and not _takes_lr(optimizer):
        raise TaskError(f"lr={lr} is given, but {optimizer_name(optimizer)} takes no lr: set the rate in it.")
    with skip_dynamo_import():
        made = optimizer(trainable, **settings)
    return _checked(made, model, optimizer)


def step_optimizers(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let optimizers update the parameters, each once, by the gradients that these have; see `step_alone`. Local."""
    with skip_dynamo_import():
        for optimizer in optimizers:
            step_alone(optimizer)


def optimizer_name(optimizer: Any) -> str:
    """The name of an optimizer in the plan and the panel."""
    if isinstance(optimizer, str):
        return optimizer.lower()
    if isinstance(optimizer, (list, tuple)):
        optimizer = {str(number): one for number, one in enumerate(optimizer)}
    if isinstance(optimizer, Mapping):
        return ", ".join(f"{name}: {optimizer_name(one)}" for name, one in optimizer.items())
    return getattr(optimizer, "__name__", None) or type(optimizer).__name__


def check_can_be_sharded(optimizer: torch.optim.Optimizer, mesh: Mesh, *, gathered: bool = False) -> None:
    """Check that an optimizer's update is the same if the mesh splits parameters, by a trial on small ones. Local.

    Args:
        optimizer: With its settings.
        mesh: The run's mesh.
        gathered: Whether its state is gathered at the end.

    Raises:
        PlanError: The update differs, or the state cannot be sent to another rank.
    """
    if type(optimizer) in ELEMENTWISE and not _has_own_step(optimizer):
        return
    if mesh.size > mesh.dp and needs_closure(optimizer):
        raise PlanError(
            f"optimizer {type(optimizer).__name__} needs a closure, to compute the loss again within its step, which "
            f"mesh {mesh} cannot: use another one, such as adamw, or the strategy data."
        )
    cut = mesh.shard > 1 or mesh.tp > 1
    how = differs(optimizer, flat=mesh.shard > 1, along=mesh.tp > 1, apart=False, sent=gathered) if cut else ""
    if how:
        raise PlanError(
            f"optimizer {type(optimizer).__name__} {how}, which mesh {mesh} splits: use another one, such as adamw, "
            "or the strategy data or pipeline."
        )
    how = differs(optimizer, flat=False, along=False, apart=True, sent=gathered) if mesh.pp > 1 else ""
    if how:
        raise PlanError(
            f"optimizer {type(optimizer).__name__} {how}, which mesh {mesh} puts on several ranks: use another one, "
            "such as adamw, or the strategy data."
        )


def _has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the object has its own `step`; a scheduler's wrapper, which only counts steps, does not matter."""
    return "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched")


def _takes_lr(optimizer: Any) -> bool:
    try:
        parameters = inspect.signature(optimizer).parameters.values()
    except ValueError:  # a builtin without a signature
        return True
    return any(p.name == "lr" or p.kind is p.VAR_KEYWORD for p in parameters)


def _checked(made: Any, model: nn.Module, given: Any) -> torch.optim.Optimizer:
    name = optimizer_name(given)
    if not isinstance(made, torch.optim.Optimizer):
        raise TaskError(f"optimizer {name} returned {type(made).__name__}, not a torch optimizer.")
    if isinstance(made, torch.optim.SparseAdam):
        raise TaskError(
            "optimizer SparseAdam takes sparse gradients only, but they are summed as dense ones: use adam."
        )
    own = {id(p) for p in model.parameters()}
    foreign = sum(id(p) not in own for group in made.param_groups for p in group["params"])
    if foreign:
        raise TaskError(
            f"optimizer {name} holds {foreign} parameters that are not the model's: build it from model.parameters(), "
            "or give a function of the parameters that makes it."
        )
    return made
