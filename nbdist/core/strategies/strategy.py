"""The Strategy base class: the forward, backward, gradient sync and update that the training loop calls."""

from __future__ import annotations

import contextlib
import math
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.data.reader import Slice, to_device
from nbdist.core.optim.closures import OptimizerSteps
from nbdist.core.optim.optimizer_modes import set_mode
from nbdist.core.optim.optimizers import step_optimizers
from nbdist.core.optim.precision import Precision
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placeholder import detached
from nbdist.core.process import rng
from nbdist.core.process.lazy_dynamo import skip_dynamo_import
from nbdist.core.strategies.pipeline.schedules import Action, run_plain_backward, schedule_actions, surrogate_loss
from nbdist.core.strategies.rank_updates import RankUpdates
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.core.sync.batch_gather import RankGather
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.step_tail import StepLosses, Totals
from nbdist.core.sync.sync_batchnorm import BatchNorms, buffers_kept_if_empty
from nbdist.core.task.task import Task
from nbdist.plan import Plan
from nbdist.telemetry import Work

__all__ = ["Strategy"]

T = TypeVar("T")
_Loss = tuple[torch.Tensor | None, bool]


class Strategy(ABC):
    """How one rank trains a task by a plan: forward and backward, gradient sync, update, final gather.

    Args:
        task: What is trained.
        plan: How.
        axes: This rank's channels, one for each mesh axis.
        hooks: The user's gradient hooks; in fp16 they get unscaled gradients, and do not run after an overflow.

    Attributes:
        table: The model's parameters and buffers, and which ranks hold which parts.
        work: Forwards and backwards of this rank in the latest step; a pipeline only.
        infos: The stages of a pipeline, as JSON-able data.
        lag: After how many steps the summed control flags are read: 1 on a GPU, so that no step waits for it.
        equal_slices: Whether all ranks must compute equally many slices, with empty ones on ranks without data.
        batch_norms: Synchronizes BatchNorm statistics over the data-parallel ranks, or None.
        batch_gather: Gathers rows of all slices for the user's step.
        reducer: Sums gradients over the data-parallel ranks; subclasses make it.
        schedule: The forwards and backwards of this rank in a step, in order.
        computes_loss: Whether this rank computes losses.
        updates: Runs steps that call `nbdist.update`; None for others.
    """

    reducer: GradientReducer

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels, hooks: GradientHooks | None = None) -> None:
        self.task = task
        self.plan = plan
        self.axes = axes
        self.device = axes.world.device
        self.lag = int(self.device.type != "cpu")
        self.table = ParamTable.of(task.model)
        self.precision = Precision(plan.precision, self.device)
        self.work: list[Work] = []
        self.infos: list[dict[str, Any]] = []
        self.batch_norms: BatchNorms | None = None
        if plan.sync_batchnorm and axes.data.size > 1:
            norms = BatchNorms(task.model, axes.data)
            self.batch_norms = norms if norms.layers else None
        at_once = plan.slices == axes.data.size and not plan.reproducible
        self.batch_gather = RankGather(axes.data, plan, rank=axes.world.rank, at_once=at_once)
        self.equal_slices = self.batch_norms is not None or at_once  # `gather` needs all ranks, also in a short batch
        self.schedule = schedule_actions("1f1b", 1, -(-plan.slices // axes.data.size))[0]
        self.computes_loss = True
        self.updates: RankUpdates | None = None
        self._hooks = hooks
        self._optimizer_steps = OptimizerSteps()
        self._one_slice = plan.slices == 1 and not plan.reproducible
        self._units_per_weight = 1.0
        self._units_agreed = task.weight_is_samples

    def begin_step(self) -> None:
        """Clear the gradients and losses of the previous step. **Collective**."""
        self.reducer.begin()

    def forward_backward(self, step: int, slices: list[Slice]) -> StepLosses:
        """Run this rank's slices and accumulate their weighted gradients. **Collective** over a replica.

        Returns:
            The losses that this rank computed.
        """
        with self.batch_gather.at_step(step):
            return self._run_slices(step, slices) if self.updates is None else self.updates.run(step, *slices)

    def _run_slices(self, step: int, slices: list[Slice]) -> StepLosses:
        reducer, waiting = self.reducer, dict[tuple[int, int], _Loss]()
        for action in self.schedule:
            if action.microbatch >= len(slices):
                continue
            part, key = slices[action.microbatch], (action.stage, action.microbatch)
            if action.kind == "forward":
                self.batch_gather.begin(counts=part.samples > 0)
                computed = self.run_forward(action, part, ("slice", step), self.task.loss_and_weight)
                if computed is not None:
                    waiting[key] = self.weigh(part, *computed, reducer.losses, first=action.microbatch == 0)
            else:
                if action.microbatch == len(slices) - 1:
                    reducer.expect_last()
                self.run_backward(action, *waiting.pop(key, (None, False)))
                reducer.add_slice(part.index)
        if not slices and self.computes_loss:
            self.units(0, None)
        return reducer.losses

    def weigh(self, part: Slice, loss: torch.Tensor, weight: Any, losses: StepLosses, *, first: bool) -> _Loss:
        """Record a slice's loss among `losses`; `first` as for `units`, which this calls.

        Returns:
            What to run backward from, and whether its gradients are not wanted.
        """
        # A mean over nothing (all targets ignored) is NaN, and so would be its gradient.
        counts = part.samples > 0 and bool(weight != 0)
        units = self.units(weight if counts else 0, part, first=first)
        if counts:
            losses.add(part.index, loss, weight, units)
        elif self.batch_gather.gathered:  # its rows count for other ranks, its loss does not
            gathered = self.batch_gather.gathered
            return surrogate_loss(gathered, [torch.zeros_like(rows) for rows in gathered]), False
        elif self.batch_norms is not None:  # its backward serves other ranks only
            self.batch_norms.zero_output_gradients()
        return self.scale_loss(loss, units if counts else 1), not counts and self.batch_norms is None

    def run_forward(
        self, action: Action, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]
    ) -> T | None:
        """Run the forward of an action; returns the function's result where the model's output is.

        **Collective** over a replica, as the schedule says.

        Args:
            action: Of the schedule.
            part: Its slice.
            path: Of the slice's random numbers.
            function: Called with batch and slice; it calls the model.
        """
        return self.compute(part, path, function)

    def run_backward(self, action: Action, loss: torch.Tensor | None, unwanted: bool) -> None:
        """Run the backward of an action. **Collective** over a replica, as the schedule says.

        Args:
            action: Of the schedule.
            loss: The scaled loss, where it was computed.
            unwanted: Whether its gradients are to be left out, because the slice does not count.
        """
        run_plain_backward(loss, unwanted)

    def units(self, weight: Any, part: Slice | None, *, first: bool = True) -> Any:
        """Rescale a slice's weight so that a full batch weighs about its number of samples. Local but for the first.

        A loss scaled by this weight has gradients of the usual size, which matters to hooks and backwards that are not
        linear in the gradient. If a batch is one slice, it weighs `batch_size`. Otherwise the factor is a power of two,
        which changes no bit of linear operations. Ranks choose it once a run, with their first slices: **Collective**
        over the data axis then.

        Args:
            weight: Zero if the slice does not count.
            part: The slice; None on a rank that has none but joins the collective.
            first: Whether it is this rank's first slice of the step.
        """
        if self._one_slice:
            return self.plan.batch_size if isinstance(weight, torch.Tensor) or weight else 0
        if first and not self._units_agreed:
            pair = torch.tensor([float(weight), 0 if part is None else part.samples], dtype=torch.float64)
            pair = pair.to(self.device)
            self.settle()
            with self.axes.data.used_for("the weights of the first slices"):
                self.axes.data.all_reduce_(pair)
            total, samples = pair.tolist()
            self._units_agreed = total > 0
            if self._units_agreed:
                self._units_per_weight = 2.0 ** round(math.log2(samples / total))
        return weight if self._units_per_weight == 1 else weight * self._units_per_weight

    def settle(self) -> None:  # noqa: B027 - nothing to do unless forwards and backwards have collectives
        """Return when no rank needs this one for its forwards and backwards so far. **Collective** over a replica."""

    def compute(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T:
        """Call ``function(batch, part)`` on a slice, under its own random numbers and the plan's precision."""
        seed = rng.derive_slice(self.plan.seed, path, part.index)
        if self.plan.reproducible:
            rng.seed_all(seed)  # the user's step may draw from Python's or NumPy's generator too
        rng.seed_torch(seed, self.device)
        batch = to_device(part.batch, self.device)
        with self.task.carried.in_use(part):
            if part.samples and self.batch_norms is None and self.precision.full:  # contexts would slow a small step
                return function(batch, part)
            with buffers_kept_if_empty(self.task.model, part, self.batch_norms), self.precision.autocast():
                return function(batch, part)

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """`compute` without gradients, for evaluation; None on ranks that do not have the model's output.

        **Collective** over a replica.
        """
        return self.compute(part, path, function)

    def scale_loss(self, loss: torch.Tensor, weight: Any) -> torch.Tensor:
        """A slice's loss times its share of a full batch, by its weight in `units`; in fp16 times the loss scale."""
        # In float64: an integer tensor divided by a number would be rounded to float32.
        share = (weight.double() if isinstance(weight, torch.Tensor) else weight) / self.plan.batch_size
        share = share * self.precision.scale
        # Not `backward(share)`: given a gradient, torch imports its symbolic shapes and sympy, which is slow.
        return loss if isinstance(share, float) and share == 1.0 else loss * share

    def sync(self, flags: ControlFlags) -> Totals:
        """Turn every gradient into the weighted mean over all ranks. **Collective**; see `GradientReducer.finish`."""
        return self.reducer.finish(flags)

    def update(self, compute_again: Callable[[], torch.Tensor]) -> bool:
        """Run the gradient hooks, clip, and step the optimizers. **Collective** over a replica.

        Args:
            compute_again: Computes the loss and all gradients again, for an optimizer that does so within its step.

        Returns:
            Whether parameters were updated: not after an overflow in fp16.
        """
        if self.precision.scales:
            self.scale_(1 / self.precision.scale)
            norm = self.norm()
            finite = bool(torch.isfinite(norm))
            self.precision.adapt(finite)
            if not finite:
                return False
        if self.updates is not None:  # by the step itself
            return True
        self._run_hooks()
        with skip_dynamo_import():
            for optimizer in self.task.optimizers.values():
                self._optimizer_steps.step(optimizer, compute_again)
        self.take_values()
        return True

    def update_by(self, names: Sequence[str]) -> None:
        """Run the gradient hooks, clip, and step some optimizers: in a step that calls `nbdist.update`. **Collective**.

        Over a replica.

        Args:
            names: Of the optimizers, whose parameters alone have gradients.
        """
        self._run_hooks()
        step_optimizers(self.task.optimizers[name] for name in names)
        self.take_values()

    def compute_again(self, step: int, slices: list[Slice]) -> torch.Tensor:
        """The loss of a step's batch with the present weights; sets its gradients too. **Collective**."""
        losses = self.reducer.losses
        with torch.enable_grad():
            self.begin_step()
            self.task.begin()
            self.forward_backward(step, slices)
        totals = self.sync(self.task.forms.flags(NO_FLAGS, step))
        self.finish_gradients()
        self.reducer.losses = losses
        return torch.tensor(totals.loss, dtype=torch.float64, device=self.device)

    def set_modes(self, *, training: bool) -> None:
        """Put optimizers that have modes into one. Local; no rank may need the others' weights then."""
        for optimizer in self.task.optimizers.values():
            set_mode(optimizer, training=training)
        self.take_values()

    def take_values(self) -> None:  # noqa: B027 - nothing to do where parameters are the memory that is trained
        """Call after optimizers have written weights, which they may have assigned as ``data``. Local."""

    @torch.no_grad()
    def write(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Give parameters other values: those of which this rank updates its parts. **Collective**."""
        for name, part in parts.items():
            detached(self.table.parameters[name]).copy_(part)
        self.take_values()

    def _run_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.run(self.table, self.axes)
        if self.plan.clip_norm is not None:
            self.clip_(self.plan.clip_norm)

    @contextlib.contextmanager
    def trial(self, scale: float) -> Iterator[None]:
        """Context for steps without update, after which the first step is as if there had been none. Local.

        Args:
            scale: The loss scale of fp16 inside.
        """
        agreed, precision = (self._units_per_weight, self._units_agreed), self.precision.state_dict()
        self.precision.load_state_dict([scale, 0])
        try:
            with contextlib.nullcontext() if self.updates is None else self.updates.held():
                yield
        finally:
            self._units_per_weight, self._units_agreed = agreed
            self.precision.load_state_dict(precision)

    def finish_gradients(self) -> None:
        """What `update` does to gradients before the optimizers step, where none overflows. **Collective** as it is."""
        if self.updates is not None:
            self.updates.put_held()
        if self.precision.scales:
            self.scale_(1 / self.precision.scale)
        self._run_hooks()

    def clip_(self, largest: float) -> None:
        """Clip all gradients to a global L2 norm of at most `largest`. **Collective** over a replica."""
        nn.utils.clip_grad_norm_(list(self.table.trainable.values()), largest)

    def scale_(self, factor: float) -> None:
        """Multiply all gradients by `factor`. Local."""
        gradients = self._gradients_held()
        if gradients:  # a stage may have nothing to train
            torch._foreach_mul_(gradients, factor)

    def norm(self) -> torch.Tensor:
        """The L2 norm of all gradients, over all ranks of a replica. **Collective** over it."""
        return nn.utils.get_total_norm(self._gradients_held())

    def _gradients_held(self) -> list[torch.Tensor]:
        return [p.grad for p in self.table.trainable.values() if p.grad is not None]

    @torch.no_grad()
    def average_buffers(self) -> None:
        """Set buffers such as running statistics to their mean over the replicas. **Collective**."""
        self.table.average_buffers_(self.axes.data, self.axes)

    def restore_shards(self) -> None:  # noqa: B027 - nothing to do unless sharded
        """After an error anywhere in a step, point every parameter at this rank's shard again. Local."""

    def gather(self, *, keep: bool = True) -> None:
        """Gather the whole model, on ranks with `keep`. **Collective**."""
        del keep

    def close(self) -> None:
        """Release the model and close the channels. Local; may be called twice."""
        if self.batch_norms is not None:
            self.batch_norms.close()
