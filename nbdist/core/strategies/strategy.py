"""What the training loop asks of a strategy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.data.reader import Slice, to_device
from nbdist.core.optim.precision import Precision
from nbdist.core.params.table import ParamTable
from nbdist.core.process import rng
from nbdist.core.process.lazy_dynamo import eager
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.gradient_sync import ControlFlags, Totals
from nbdist.core.sync.slice_accumulator import SliceAccumulator
from nbdist.core.sync.sync_batchnorm import BatchNorms, buffers_kept_if_empty
from nbdist.core.task.task import Task
from nbdist.plan import Plan
from nbdist.telemetry import Work

__all__ = ["Computed", "Strategy"]

T = TypeVar("T")
Computed = tuple[Any, list[tuple[torch.Tensor, Any]]]
"""Sum of the slices' weights, in `Strategy.units`, and each slice's loss with its weight; nothing on ranks that do not
see the loss."""


class Strategy(ABC):
    """A task and a plan, turned into something with forward and backward, sync, update and home-coming.

    Args:
        task: What is trained.
        plan: How.
        axes: This rank's channels.

    Attributes:
        table: The model's parameters and buffers, and where their parts lie.
        work: What this rank did in the latest step, where there is an order to show.
        infos: The stages that a pipeline was cut into, as JSON-able data.
        lag: How many steps late ranks hear what they have agreed on: a GPU is not waited for.
        even: Whether all ranks must compute equally many slices, those without data included.
        batch_norms: What lets BatchNorm see the slices of all ranks, or None.
        sums: What adds up slices in the same order on any number of ranks, or None.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels) -> None:
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
        self.even = self.batch_norms is not None
        self.sums: SliceAccumulator | None = None
        if plan.reproducible:
            trainable, buffers = list(self.table.trainable.values()), list(self.table.buffers.values())
            self.sums = SliceAccumulator(trainable, buffers, axes.data, plan.slices)
        self._samples_a_weight = 1.0
        self._agreed = task.weighs_samples

    @abstractmethod
    def begin_step(self) -> None:
        """Forget the gradients of the step before. **Collective**."""

    def forward_backward(self, step: int, slices: list[Slice]) -> Computed:
        """Run this rank's slices and add up their gradients, each times its weight. **Collective** over a replica."""
        total: Any = 0
        losses: list[tuple[torch.Tensor, Any]] = []
        for position, part in enumerate(slices):
            loss, weight = self.compute(part, ("slice", step), self.task.loss_and_weight)
            # A mean over nothing (all targets ignored) is not a number: it has no gradient to give.
            counts = part.samples > 0 and bool(weight != 0)
            units = self.units(weight if counts else 0, part, first=position == 0)
            if counts or self.batch_norms is not None:
                self.silence(counts)
                self.backward(loss, units if counts else 1, last=position == len(slices) - 1)
            if counts:
                total = total + units
                losses.append((loss.detach(), weight))
            if self.sums is not None:
                self.sums.take(part.index, losses[-1] if counts else None)
        if not slices:
            self.units(0, None)
        return total, losses

    def units(self, weight: Any, part: Slice | None, *, first: bool = True) -> Any:
        """A slice's weight in units of which a full batch has about as many as samples. Local but for the first slice.

        What is not linear in an activation's gradient then sees the share of the slice in the whole: all of it where a
        batch is one slice. Otherwise the unit is a power of two, which changes no bit of what is linear. It is agreed
        upon once a run, with the first slice of each rank: **Collective** over the data axis then.

        Args:
            weight: Zero where the slice does not count.
            part: The slice; None where a rank that takes part has none.
            first: Whether it is the first of the step.
        """
        if self.plan.slices == 1 and self.sums is None:
            return self.plan.batch_size if isinstance(weight, torch.Tensor) or weight else 0
        if first and not self._agreed:
            pair = torch.tensor([float(weight), 0 if part is None else part.samples], dtype=torch.float64)
            pair = pair.to(self.device)
            self.axes.data.all_reduce_(pair)
            total, samples = pair.tolist()
            self._agreed = total > 0
            if self._agreed:
                self._samples_a_weight = 2.0 ** round(math.log2(samples / total))
            if self.sums is not None:
                self.sums.units = self._samples_a_weight
        return weight if self._samples_a_weight == 1 else weight * self._samples_a_weight

    def compute(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T:
        """Call ``function(batch, part)`` on a slice, under its own random numbers and the plan's precision."""
        seed = rng.derive(self.plan.seed, *path, part.index)
        if self.sums is not None:
            rng.seed_all(seed)  # a step of the user's may draw from other generators too
        rng.seed_torch(seed, self.device)
        batch = to_device(part.batch, self.device)
        if part.samples and self.batch_norms is None and self.precision.full:  # spares a small step the contexts
            return function(batch, part)
        with buffers_kept_if_empty(self.task.model, part, self.batch_norms), self.precision.autocast():
            return function(batch, part)

    def forward(self, part: Slice, path: tuple[Any, ...], function: Callable[[Any, Slice], T]) -> T | None:
        """`compute` without gradients, for evaluation; None on ranks that do not see the model's output.

        **Collective** over a replica.
        """
        return self.compute(part, path, function)

    def silence(self, counts: bool) -> None:
        """Before the backward of a slice that does not count: only what passes between ranks has gradients. Local."""
        if self.batch_norms is not None and not counts:
            self.batch_norms.silence()

    def backward(self, loss: torch.Tensor, weight: Any, *, last: bool) -> None:
        """Add a slice's gradients, times its weight in `units`. Local; `last`: no other slice follows in this step."""
        self.scaled(loss, weight).backward()

    def scaled(self, loss: torch.Tensor, weight: Any) -> torch.Tensor:
        """The share of a slice's loss in that of a full batch, by its weight in `units`; for fp16 times the scale."""
        # In float64, for a count divided by a number would be rounded to float32.
        share = (weight.double() if isinstance(weight, torch.Tensor) else weight) / self.plan.batch_size
        share = share * self.precision.scale
        # Not `backward(share)`: given a gradient, torch loads its symbolic shapes, and sympy with them.
        return loss if isinstance(share, float) and share == 1.0 else loss * share

    @abstractmethod
    def sync(self, weight: Any, flags: ControlFlags, loss: tuple[Any, Any] = (0.0, 0.0)) -> Totals:
        """Make every gradient the weighted mean over all ranks. **Collective**; see `GradientSync.finish`."""

    def counted(self, losses: list[tuple[Any, Any]], totals: Totals) -> list[tuple[Any, Any]]:
        """The losses, with their weights, that a step adds to this rank's part of the history. Local."""
        if self.sums is None:
            return losses
        return [(totals.loss, totals.loss_weight)] if self.axes.data.rank == 0 and totals.weight else []

    def update(self, optimizer: torch.optim.Optimizer, hooks: GradientHooks) -> bool:
        """Let hooks have the gradients, clip them and update the parameters. **Collective** over a replica.

        Args:
            optimizer: Whose step it is.
            hooks: The user's; in fp16 they see what is unscaled, and nothing of an overflow.

        Returns:
            Whether it did: not after an overflow in fp16.
        """
        if self.precision.scales:
            self.scale_(1 / self.precision.scale)
            norm = self.norm()
            finite = bool(torch.isfinite(norm))
            self.precision.adapt(finite)
            if not finite:
                return False
        hooks.run(self.table, self.axes)
        if self.plan.clip_norm is not None:
            self.clip_(self.plan.clip_norm)
        with eager():
            optimizer.step()
        return True

    def clip_(self, largest: float) -> None:
        """Scale all gradients down so that their global L2 norm is at most `largest`. **Collective** over a replica."""
        nn.utils.clip_grad_norm_(list(self.table.trainable.values()), largest)

    def scale_(self, factor: float) -> None:
        """Multiply all gradients. Local."""
        gradients = self._gradients_held()
        if gradients:  # a stage may have nothing to train
            torch._foreach_mul_(gradients, factor)

    def norm(self) -> torch.Tensor:
        """The L2 norm of all gradients, over all ranks of a replica. **Collective** over it."""
        return nn.utils.get_total_norm(self._gradients_held())

    def _gradients_held(self) -> list[torch.Tensor]:
        return [p.grad for p in self.table.trainable.values() if p.grad is not None]

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Make buffers such as running statistics the same on every replica: their mean. **Collective**."""
        self.table.average_buffers_(self.axes.data, self.axes)

    def restore_shards(self) -> None:  # noqa: B027 - most hold them all the time
        """After an error, wherever it was: let every parameter be the part that this rank holds. Local."""

    def gather(self, *, keep: bool = True) -> None:
        """Make the model whole and ordinary again, where `keep` says so. **Collective**."""
        del keep

    def close(self) -> None:
        """Let go of the model and hang up. Local, twice is fine."""
        if self.batch_norms is not None:
            self.batch_norms.close()
