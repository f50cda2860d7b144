"""Known checks: what was found for a model, a step and a mesh in this session, so that it is checked once."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Hashable
from typing import Any, Protocol

from torch import nn

from nbdist.core.task.losses import ClassLoss
from nbdist.core.task.steps import SupervisedStep
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["Checked", "KnownChecks"]


class Checked(Protocol):
    """What knows, sooner or later, the result of a check; see `Findings`."""

    @property
    def checked(self) -> str:
        """The result; empty while there is none."""


class KnownChecks:
    """The checks of this session. Local."""

    def __init__(self) -> None:
        self._of_model: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Checked]] = weakref.WeakKeyDictionary()

    def find(self, task: Task, plan: Plan) -> str:
        """The result of an earlier check of the same model, step and mesh; empty if there is none."""
        known = self._of_model.get(_first(task), {}).get(_key(task, plan))
        failed = bool(getattr(known, "error", None))  # a run that failed knows nothing
        return "" if known is None or failed else known.checked

    def add(self, task: Task, plan: Plan, checked: Checked) -> None:
        """Remember what will know the result."""
        self._of_model.setdefault(_first(task), {})[_key(task, plan)] = checked


def _first(task: Task) -> nn.Module:
    """The first of the user's modules, which outlives a run."""
    return next(iter(task.modules.values()))


def _key(task: Task, plan: Plan) -> Hashable:
    """What a check depends on, but for values: another forward, step, shape or mesh has another key."""
    modules = tuple(
        (name, type(module), getattr(getattr(type(module), "forward", None), "__code__", None), module.training)
        for name, module in task.model.named_modules()
    )
    tensors = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in task.model.named_parameters())
    step = task.step.loss if isinstance(task.step, SupervisedStep) else task.own_step
    optimizers = tuple(type(optimizer) for optimizer in task.optimizers.values())
    how = (
        plan.check, str(plan.mesh), plan.slices, plan.precision, plan.reproducible, plan.sync_batchnorm, plan.clip_norm,
        plan.batch_size, plan.split_at, plan.schedule, repr(plan.tensor_plan),
    )  # fmt: skip
    return modules, tensors, _step_key(step), optimizers, how


def _step_key(step: Any) -> Hashable:
    """Equal for functions of equal code over the same values, such as a cell that runs again."""
    if isinstance(step, ClassLoss):  # made anew for each run
        return _step_key(step.given)
    if isinstance(step, types.FunctionType):
        cells = tuple(_Same(cell.cell_contents) for cell in step.__closure__ or () if cell != types.CellType())
        return step.__code__, cells
    if isinstance(step, functools.partial):
        return _step_key(step.func), repr(step.args), repr(step.keywords)
    return type(step), _Same(step) if getattr(step, "__dict__", None) else None


class _Same:
    """Equal to that of the same object, as long as it lives: another one may have its address later."""

    def __init__(self, value: Any) -> None:
        self._address = id(value)
        self._value: Any = None
        try:
            self._alive: Any = weakref.ref(value)
        except TypeError:  # such as a number: it lives as long as this
            self._value, self._alive = value, lambda: True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self._address != other._address:
            return False
        return self._alive() is not None and other._alive() is not None

    def __hash__(self) -> int:
        return hash(self._address)
