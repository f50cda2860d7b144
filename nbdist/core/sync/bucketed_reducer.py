"""Gradient all-reduce in flat buckets, overlapping with backward on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel, Pending
from nbdist.core.params.param_table import copy_or_zero_, view_like
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.step_tail import StepTail, Totals, tail_dtype

__all__ = ["BucketedReducer", "SumReplica"]

SumReplica = Callable[[tuple[Any, ...], ControlFlags, list[bool]], tuple[Sequence[Any], ControlFlags, list[bool]]]


@dataclass
class _Bucket:
    """A contiguous range of a flat buffer, all-reduced as one; `missing` gradients are not computed yet."""

    flat: torch.Tensor
    members: list[int]
    missing: int = 0
    pending: Pending | None = None


class BucketedReducer(GradientReducer):
    """Holds all gradients in flat buffers and sums them over a channel once a step.

    Each parameter's ``.grad`` is a view into a flat buffer, one per dtype, so backward accumulates in place and the
    sync is a few large collectives. The last buffer also carries the tail, so stopping together and skipping unused
    parameters cost no collective of their own.

    If the sync overlaps with backward, gradients stay where backward allocated them until their bucket is complete.
    Then one call copies all of them into it: accumulating in place would be a kernel for each.

    Args:
        parameters: Trainable parameters, on the channel's device.
        channel: See `GradientReducer`.
        full_batch: See `GradientReducer`.
        bucket_mib: Largest bucket in MiB if the sync overlaps with backward.
        overlap: Whether buckets start while backward still runs. It pays if the collective runs beside the
            computation, as with NCCL. None: on a GPU, and where the channel `overlaps`.
        sum_replica: Sums the rank's numbers over its replica first, where several ranks make one: the loss's, the
            flags, and which parameters were used.
    """

    def __init__(
        self, parameters: list[nn.Parameter], channel: Channel, *, full_batch: float = 1.0, bucket_mib: float = 25.0,
        overlap: bool | None = None, sum_replica: SumReplica | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channel, full_batch)
        self._parameters = parameters
        self._overlap = channel.overlaps or channel.device.type == "cuda" if overlap is None else overlap
        self._sum_replica = sum_replica
        self._used: list[Any] = [None] * len(parameters)
        self._armed = False
        self._buckets: list[_Bucket] = []
        self._views: list[torch.Tensor] = [torch.empty(0)] * len(parameters)
        self._bucket_of: list[int] = [0] * len(parameters)
        self._flats: list[torch.Tensor] = []
        self._tail = StepTail(len(parameters))
        self._sums = self._lay_out(bucket_mib * 2**20 if self._overlap else float("inf"))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(i)) for i, parameter in enumerate(parameters)
        ]

    def _lay_out(self, bucket_bytes: float) -> torch.Tensor:
        """Make flat buffers, parameters in reverse (the order in which backward reaches them); returns the tail."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in reversed(range(len(self._parameters))):
            by_dtype.setdefault(self._parameters[i].dtype, []).append(i)
        tail_type = tail_dtype(by_dtype)  # its buffer is the last one
        by_dtype[tail_type] = by_dtype.pop(tail_type, [])
        for dtype, members in by_dtype.items():
            length = sum(self._parameters[i].numel() for i in members)
            extra = self._tail.numel if dtype is tail_type else 0
            flat = self.channel.zeros(length + extra, dtype)
            self._flats.append(flat)
            start = offset = 0
            full: list[int] = []
            for i in members:
                parameter = self._parameters[i]
                if full and (offset + parameter.numel() - start) * flat.itemsize > bucket_bytes:
                    self._buckets.append(_Bucket(flat[start:offset], full))
                    start, full = offset, []
                self._views[i] = view_like(parameter, flat, offset)
                self._bucket_of[i] = len(self._buckets)
                offset += parameter.numel()
                full.append(i)
            self._buckets.append(_Bucket(flat[start:], full))
        return self._flats[-1][-self._tail.numel :]

    def _hook(self, i: int) -> Any:
        if not self._overlap:
            return functools.partial(self._used.__setitem__, i)  # a C function: no Python frame in backward

        def hook(parameter: nn.Parameter) -> None:
            self._used[i] = parameter
            if self._armed:
                self._buckets[self._bucket_of[i]].missing -= 1
                self._start_ready()

        return hook

    def zero_(self) -> None:
        """See `GradientReducer`."""
        if self._overlap:
            for parameter in self._parameters:
                parameter.grad = None
        else:
            for flat in self._flats:
                flat.zero_()
            for parameter, view in zip(self._parameters, self._views, strict=True):
                parameter.grad = view
        self._used[:] = [None] * len(self._used)
        self._armed = False

    def expect_last(self) -> None:
        """See `GradientReducer`: buckets may now start when complete."""
        for bucket in self._buckets:
            bucket.missing, bucket.pending = len(bucket.members), None
        self._armed = self._overlap

    def _start_ready(self, everything: bool = False) -> None:
        """Start complete buckets, in the same order on all ranks: collectives must match. The last ends the step."""
        for bucket in self._buckets if everything else self._buckets[:-1]:
            if bucket.pending is None:
                if bucket.missing and not everything:
                    return
                if self._overlap:
                    self._fill(bucket)
                bucket.pending = self.channel.start_all_reduce_(bucket.flat)

    @torch.no_grad()
    def _take_replaced(self, used: list[bool]) -> None:
        """Copy gradients that are no views into their places: the step has set them to None, as ``zero_grad`` does."""
        for i, (parameter, view) in enumerate(zip(self._parameters, self._views, strict=True)):
            gradient = parameter.grad
            if gradient is not view:
                used[i] &= gradient is not None
                copy_or_zero_([view], [gradient])
                parameter.grad = view

    def _fill(self, bucket: _Bucket) -> None:
        """Copy the gradients of a bucket into it; from now on they are views of it."""
        made = [self._parameters[i].grad for i in bucket.members]
        places = [self._views[i] for i in bucket.members]
        copy_or_zero_(places, [g.to_dense() if g is not None and g.is_sparse else g for g in made])
        for i, place in zip(bucket.members, places, strict=True):
            self._parameters[i].grad = place

    def finish(self, flags: ControlFlags = NO_FLAGS) -> Totals:
        """See `GradientReducer`."""
        if not self._armed:
            self.expect_last()
        self._armed = False
        losses: Sequence[Any] = self.losses.numbers
        used = [hit is not None for hit in self._used]
        if not self._overlap:
            self._take_replaced(used)
        if self._sum_replica is not None:
            losses, flags, used = self._sum_replica(self.losses.numbers, flags, used)
        self._tail.write(self._sums, losses, flags, used)
        self._start_ready(everything=True)
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait_on_device()
            bucket.pending = None  # a finished work object would keep its process group, and so its connections, alive
        totals = self._tail.totals(self._sums)
        if self._sums.device.type == "cpu":
            self.divide_(self._flats, totals)
        else:  # computed on the GPU: reading totals.weight would wait for it
            weight = self._tail.losses(self._sums)[0, 0]
            torch._foreach_div_(self._flats, torch.where(weight == 0, 1.0, weight / self.full_batch))
        if not all(used):  # a rank that used every parameter itself need not read the counts
            for parameter, count in zip(self._parameters, self._tail.used(self._sums), strict=True):
                if count == 0:
                    parameter.grad = None
        return totals

    def close(self) -> None:
        """See `GradientReducer`."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None
        for flat in self._flats:
            self.channel.free(flat)
        self._flats, self._views, self._buckets = [], [], []
        self._sums = torch.empty(0)
