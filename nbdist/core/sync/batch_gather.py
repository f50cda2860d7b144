"""What a step may ask of its run: `nbdist.gather`, a tensor's rows from all slices; rank, world size, step number."""

from __future__ import annotations

import contextlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from nbdist.core.comm import Channel
from nbdist.errors import TaskError
from nbdist.plan import Plan

__all__ = ["BatchGather", "PlainGather", "RankGather", "current_step", "gather", "rank", "world_size"]


class BatchGather(ABC):
    """What `gather` does in the steps of a run, and what `rank`, `world_size` and `current_step` are there."""

    rank = 0
    world_size = 1
    step = 0

    @abstractmethod
    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `gather`."""

    @contextlib.contextmanager
    def at_step(self, step: int) -> Iterator[None]:
        """Context of a step, or of what comes after it. Local."""
        self.step = step
        try:
            yield
        finally:
            self.step = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Context in which `gather` calls `rows`. Local."""
        global _present
        before, _present = _present, self
        try:
            yield
        finally:
            _present = before


_present: BatchGather | None = None


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of `tensor` for all samples of the batch, with gradients: in a step, for losses over the whole batch.

    Contrastive losses and in-batch negatives compare samples with each other, and the batch's own statistics depend on
    all of them; a step sees its slice only. ``z = nbdist.gather(z)`` gives it the whole batch: every rank may compute
    the loss of all rows, or of its own against all. Loss and gradients are then those of one process, however the
    batch is cut, since gradients flow back to the rank that computed a row.

    Outside of a run, and on one rank, it returns `tensor` as it is. **Collective** over the data axis: every slice
    calls it equally often, with rows of the same shape and dtype.

    Args:
        tensor: ``(rows, ...)``: as many rows as the slice has samples, or a multiple, which then stay together.

    Returns:
        ``(all rows, ...)``, in the order of the samples.

    Raises:
        TaskError: It is no such tensor, ranks differ, or a rank computes several slices one after another.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
        what = "a tensor without dimensions" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise TaskError(f"nbdist.gather takes a tensor whose first dimension is the samples, not {what}.")
    return tensor if _present is None else _present.rows(tensor)


def rank() -> int:
    """The rank of this process: in a step, in the run; elsewhere torchrun's or the engine's; 0 in a notebook. Local.

    For what one rank does for all, such as printing. It does not say which rows of a batch a slice has: slices differ
    in size, and with ``tp`` or ``pp`` several ranks compute the same ones. Of the rows that `gather` returns, one's
    own are found by a number that each sample has, for example ``nbdist.gather(index)[None] == index[:, None]``.
    """
    return int(os.environ.get("RANK", "0")) if _present is None else _present.rank


def world_size() -> int:
    """The number of ranks: in a step, of the run; elsewhere torchrun's or the engines'; 1 in a notebook. Local."""
    return int(os.environ.get("WORLD_SIZE", "1")) if _present is None else _present.world_size


def current_step() -> int:
    """The number of the step that is computed, from 0; in an evaluation, of the steps so far; elsewhere 0. Local.

    It is the same on all ranks and in all slices, and goes on after a recovery or a resume, which a counter of the
    step's own does not. For what happens in some steps only, as in ``if nbdist.current_step() % 5 == 0``, or grows
    with them, such as the weight of a loss.
    """
    return 0 if _present is None else _present.step


class RankGather(BatchGather):
    """Gathers over the ranks of the data axis, each of which computes one slice of a batch.

    Args:
        channel: The data axis.
        plan: For errors.
        rank: This process's, in the world.
        at_once: Whether each rank has one slice of every batch, if need be one without samples.

    Attributes:
        counts: Whether the slice that is computed has samples; else its rows are left out.
        gathered: The results in this slice that have gradients.
        step: The number of the step.
    """

    def __init__(self, channel: Channel, plan: Plan, *, rank: int, at_once: bool) -> None:
        self._channel, self._plan, self._at_once = channel, plan, at_once
        self.rank, self.world_size = rank, plan.mesh.size
        self.counts = True
        self.gathered: list[torch.Tensor] = []

    def begin(self, *, counts: bool) -> None:
        """Begin a slice. Local."""
        self.counts, self.gathered = counts, []

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `gather`."""
        channel = self._channel
        if not self._at_once:
            plan = self._plan
            if plan.reproducible:
                given, cure = f"reproducible={plan.reproducible}", "omit it"
            elif plan.mesh.pp > 1:
                given, cure = f"a pipeline of {plan.slices_per_rank} microbatches", "use microbatches=1, accumulate=1"
            else:
                given, cure = f"accumulate={plan.accumulate}", "use 1"
            raise TaskError(
                f"nbdist.gather needs all samples of a batch at the same time, but with {given} a rank may compute "
                f"several slices of it one after another: {cure}."
            )
        if channel.size == 1:
            return tensor
        with channel.used_for("nbdist.gather"):
            counts = self._counts(tensor)
            gathered: torch.Tensor = _GatherRows.apply(tensor, channel, counts)  # type: ignore[no-untyped-call]
        if gathered.requires_grad:
            self.gathered.append(gathered)
        return gathered

    def _counts(self, tensor: torch.Tensor) -> list[int]:
        """The number of rows of each rank; that of a slice without samples is 0."""
        kind = zlib.crc32(repr((tuple(tensor.shape[1:]), tensor.dtype)).encode())
        own = torch.tensor([len(tensor) if self.counts else 0, kind], device=self._channel.device)
        counts, kinds = zip(*(pair.tolist() for pair in self._channel.all_gather(own)), strict=True)
        if len(set(kinds)) > 1:
            raise TaskError(
                f"nbdist.gather got rows of other shapes or dtypes on other ranks (here {tuple(tensor.shape)}, "
                f"{tensor.dtype}): give it rows that are alike, in the same order of calls."
            )
        return list(counts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, channel: Channel, counts: list[int]) -> torch.Tensor:
        ctx.channel, ctx.counts, ctx.shape = channel, counts, tensor.shape
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: counts[channel.rank]] = tensor[: counts[channel.rank]]
        parts = channel.all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        with ctx.channel.used_for("the backward of nbdist.gather"):
            ctx.channel.all_reduce_(total)
        rank, counts = ctx.channel.rank, ctx.counts
        own = total.new_zeros(ctx.shape)
        start = sum(counts[:rank])
        own[: counts[rank]] = total[start : start + counts[rank]]
        return own, None, None


class PlainGather(BatchGather):
    """In one process, where a slice is all there is.

    Attributes:
        called: Whether `gather` was called.
    """

    def __init__(self) -> None:
        self.called = False

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `gather`."""
        self.called = True
        return tensor
