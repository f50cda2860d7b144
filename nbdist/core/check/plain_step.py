"""A training step as one process would run it, slice by slice: what every mesh must give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nbdist.core.data.reader import Slice, copy_batch, to_device
from nbdist.core.optim.optimizers import step_optimizers
from nbdist.core.optim.precision import Precision
from nbdist.core.params.extra_state import extra_states
from nbdist.core.params.last_bits import nudge_
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.program_state import ProgramState
from nbdist.core.process import rng
from nbdist.core.strategies.pipeline.schedules import run_plain_backward
from nbdist.core.sync.batch_gather import PlainGather
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.task.step_updates import StepUpdates
from nbdist.core.task.task import Task
from nbdist.errors import NbdistError
from nbdist.plan import Plan
from nbdist.upstream.torch_private import graph_dtypes

__all__ = ["PlainStep", "StepResult"]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of a step, before any parameter is updated.

    Args:
        loss: The weighted mean of the slices' losses.
        losses: Those of the slices.
        dtype: Of the losses.
        gradients: Of the batch, by parameter; None for one that no slice used.
        buffers: After the step, the mean over the replicas.
        extra: What each module's ``get_extra_state`` returns after it, on the first replica.
        logged: What the step logs: means over the slices, by name.
        updated: Parameters after an update by these gradients; empty if it was not run, or draws random numbers.
    """

    loss: float
    losses: list[float]
    dtype: torch.dtype
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    extra: dict[str, Any]
    logged: dict[str, float] = field(default_factory=dict)
    updated: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients are finite."""
        return math.isfinite(self.loss) and all(g is None or bool(g.isfinite().all()) for g in self.gradients.values())


class PlainStep:
    """Runs steps of a task in this process alone, on its whole model, and leaves no trace of them. Local.

    Args:
        task: The task; its model is whole, and on `device`.
        plan: How it is trained.
        hooks: The user's gradient hooks.
        capture: Returns the present state of all that a step may change; it is put back before each replica's slices.
        device: Where it computes.
        forward_only: Whether losses are computed without gradients.

    Attributes:
        kept: The paths of what a replica's slices have changed, but for gradients.
        kept_again: The paths of what a second pass over them has changed again.
        draws: Whether a slice has drawn random numbers from torch's generators.
        draws_elsewhere: Whether one has drawn some from Python's or NumPy's.
        gather: In use while a slice is computed.
    """

    def __init__(
        self, task: Task, plan: Plan, hooks: GradientHooks, capture: Callable[[], ProgramState], device: torch.device,
        *, forward_only: bool = False,
    ) -> None:  # fmt: skip
        self._task, self._plan, self._hooks, self._capture, self._device = task, plan, hooks, capture, device
        self._forward_only = forward_only
        self.state = capture()
        self.kept: list[str] = []
        self._knows_kept = False
        self._changed = True
        self.kept_again: list[str] = []
        self._table = ParamTable.of(task.model)
        self._precision = Precision(plan.precision, device)
        self.draws = self.draws_elsewhere = False
        self.gather = PlainGather()
        self._updates = PlainUpdates(task) if task.updates else None
        self._graph_eps: float | None = None
        self._loss_dtype = torch.float32

    def run(
        self, replicas: Sequence[Sequence[Slice]], *, again: bool = True, nudge: bool = False, update: bool = False
    ) -> StepResult:
        """Run one step: the slices of one replica after another, each replica from the same state.

        Args:
            replicas: The slices that each replica would run.
            again: Whether each replica runs its slices once more, without backward, if they have changed something: so
                that it shows how what is kept goes on.
            nudge: Whether half of all weights are changed in their last bit, which is what rounding does.
            update: Whether the optimizers update the parameters at the end; this is undone too.

        Raises:
            Exception: What the user's step raises.
        """
        sums = dict[str, torch.Tensor | None].fromkeys(self._table.trainable)
        losses: list[tuple[float, float]] = []
        total, averaged, extra = 0.0, dict[str, list[torch.Tensor]](), dict[str, Any]()
        self._task.begin()
        if self._updates is not None:
            self._updates.begin()
        try:
            for number, slices in enumerate(replicas):
                self._restore()
                for parameter in self._table.parameters.values():
                    parameter.grad = None
                if nudge:
                    self._nudge()
                self._changed = True
                for part in slices:
                    losses.append(self._slice(part, not self._forward_only))
                    total += losses[-1][1]
                for name in sums:
                    gradient, self._table.parameters[name].grad = self._table.parameters[name].grad, None
                    if gradient is not None:
                        gradient = gradient.to_dense() if gradient.is_sparse else gradient
                        held = sums[name]
                        sums[name] = gradient if held is None else held.add_(gradient)
                if not self._knows_kept:
                    self.kept, self._knows_kept = self.state.changes(), True
                if self.kept and again:
                    before = self._capture()
                    with self._task.forms.aside(), self._task.log.aside():
                        for part in slices:
                            self._slice(part, False)
                    self.kept_again = self.kept_again or before.changes()
                for name, buffer in dict(self._task.model.named_buffers()).items():
                    averaged.setdefault(name, []).append(buffer.detach().clone())
                extra = copy.deepcopy(extra_states(self._task.model)) if number == 0 else extra
                self._changed = bool(self.kept or nudge)
            self._task.forms.check_no_sum()
            logged = self._task.log.means()
            weight = total
            if self._updates is not None:  # of each update they are means already
                sums, weight = self._updates.gradients(self._table.trainable), float(self._plan.batch_size)
            gradients = {} if self._forward_only else self._finished(sums, weight)
            updated = self._update(gradients) if update and gradients else {}
        finally:
            self._restore()
        mean = sum(loss * weight for loss, weight in losses if weight) / total if total else math.nan
        buffers = {name: _mean(values) for name, values in averaged.items() if len(values) == len(replicas)}
        each = [loss for loss, _ in losses]
        return StepResult(
            loss=mean, losses=each, dtype=self._loss_dtype, gradients=gradients, buffers=buffers, extra=extra,
            logged=logged, updated=updated,
        )  # fmt: skip

    def carry(self, slices: Sequence[Slice]) -> None:
        """Run a step on each slice, forward only, which begins with what the one before has carried.

        Raises:
            Exception: What the user's step raises.
        """
        self._changed = True
        try:
            with self._task.carried.apart(), self._task.forms.aside(), self._task.log.aside():
                for number, part in enumerate(slices):
                    self._task.begin()
                    if self._updates is not None:
                        self._updates.begin()
                    self._slice(part, False)
                    self._task.carried.end_step(number)
        finally:
            self._restore()

    def _restore(self) -> None:
        """Put everything back, unless it is known that nothing has changed."""
        if self._changed:
            self.state.restore()
        self._changed = False

    def _slice(self, part: Slice, backward: bool) -> tuple[float, float]:
        """Run one slice; returns its loss and weight."""
        seed = rng.derive_slice(self._plan.seed, ("slice", 0), part.index)
        rng.seed_all(seed)
        rng.seed_torch(seed, self._device)
        before = rng.generators(self._device)
        updates = self._updates
        if updates is not None:
            updates.backward = backward
        compute = self._task.loss_and_weight if updates is None else updates.loss_and_weight
        with (
            self.gather.in_use(),
            self._task.carried.in_use(part),
            self._precision.autocast(),
        ):  # with gradients, which the step may take itself
            loss, weight = compute(to_device(copy_batch(part.batch), self._device), part)
        if self._graph_eps is None:
            self._graph_eps = max((torch.finfo(d).eps for d in graph_dtypes(loss) if d.is_floating_point), default=0.0)
        if backward and updates is None:
            share = float(weight) / self._plan.batch_size * self._precision.scale
            if share:
                run_plain_backward(loss * share, unwanted=False)
        self._loss_dtype = loss.dtype
        of_torch, elsewhere = rng.drawn_since(before, self._device)
        self.draws |= of_torch
        self.draws_elsewhere |= elsewhere
        return float(loss.detach()), float(weight)

    def _finished(self, sums: dict[str, torch.Tensor | None], total: float) -> dict[str, torch.Tensor | None]:
        """The gradients of the batch, after the user's hooks and clipping."""
        factor = total / self._plan.batch_size * self._precision.scale
        for name, gradient in sums.items():
            self._table.parameters[name].grad = gradient if gradient is None else gradient.div_(factor or 1.0)
        self._hooks.run(self._table, None)
        self._changed |= len(self._hooks) > 0
        if self._plan.clip_norm is not None:
            nn.utils.clip_grad_norm_(list(self._table.trainable.values()), self._plan.clip_norm)
        finished = {}
        for name in sums:
            finished[name], self._table.parameters[name].grad = self._table.parameters[name].grad, None
        return finished

    def _update(self, gradients: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Run the optimizers; returns the updated parameters, or nothing if it cannot be done twice."""
        for name, gradient in gradients.items():
            self._table.parameters[name].grad = None if gradient is None else gradient.clone()
        before = rng.generators(self._device)
        self._changed = True
        try:
            step_optimizers(self._task.optimizers.values())
        except NbdistError:
            raise
        except Exception:  # the run's first update will raise it again
            return {}
        if any(rng.drawn_since(before, self._device)):
            return {}
        return {name: p.detach().clone() for name, p in self._table.trainable.items()}

    @property
    def scale(self) -> float:
        """The loss scale of fp16; else 1."""
        return self._precision.scale

    @property
    def coarsest_eps(self) -> float:
        """The relative rounding of the coarsest numbers: under autocast, or where a forward converts its tensors."""
        return max(self._precision.eps, self._graph_eps or 0.0)

    def lower_scale(self) -> bool:
        """Lower the loss scale after an overflow; returns whether it could be."""
        lower = self._precision.scales and self._precision.scale > 1
        if lower:
            self._precision.scale = max(1.0, self._precision.scale / 16)
        return lower

    def _nudge(self) -> None:
        tf32 = self._device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        nudge_(self._table.parameters.values(), max(self.coarsest_eps, 2.0**-11 if tf32 else 0.0))


class PlainUpdates(StepUpdates):
    """Holds back the updates within steps: each gives gradients only, which are averaged over the slices. Local.

    Args:
        task: What is trained.

    Attributes:
        backward: Whether gradients are computed.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.backward = True
        self._sums: list[tuple[dict[torch.Tensor, torch.Tensor], float]] = []

    def begin(self) -> None:
        """A step begins."""
        self._sums = []

    def apply(self, names: Sequence[str], loss: torch.Tensor, weight: Any, retain_graph: bool) -> None:
        """See `StepUpdates`. Local."""
        if not self.backward:
            return
        if len(self._sums) < self.calls:
            self._sums.append(({}, 0.0))
        sums, total = self._sums[self.calls - 1]
        if weight:
            parameters = self.parameters_of(names)
            torch.autograd.backward(loss * float(weight), inputs=parameters, retain_graph=retain_graph)
            for parameter in parameters:
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None:
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    sums[parameter] = gradient + sums.get(parameter, 0)
        self._sums[self.calls - 1] = sums, total + float(weight)

    def gradients(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor | None]:
        """The sum of each parameter's gradients in the step, one for each update; None for one that has none."""
        found = dict[str, torch.Tensor | None].fromkeys(parameters)
        for name, parameter in parameters.items():
            means = [sums[parameter] / total for sums, total in self._sums if parameter in sums]
            if means:
                found[name] = sum(means[1:], start=means[0])
        return found


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    """The mean of a buffer over replicas, as `ParamTable.average_buffers_` computes it; else that of the first."""
    first, *others = values
    if not others or not first.is_floating_point():
        return first
    return first + sum(torch.where(value == first, 0.0, value - first) for value in others) / len(values)
