"""Gradient all-reduce in flat buckets: weighted, and overlapping with backward on GPUs."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nbdist.core.comm import Channel, Pending
from nbdist.core.params.param_table import copy_or_zero_, view_like

__all__ = ["COUNTS", "ControlFlags", "GradientSync", "Totals", "tail_dtype"]

_POLL_S = 5e-5


class ControlFlags(NamedTuple):
    """One rank's flags at the end of a step, zeros and ones; after the sync, the number of ranks that set each.

    Args:
        commands: The rank has commands for all ranks, see `StepControl`.
        exhausted: It has no data left.
        snapshot: It asks all ranks to take a snapshot after this step.
        checkpoint: It asks all ranks to write a checkpoint of this step to disk.
        written: Its part of the checkpoint under way is on disk.
        unwritten: It failed to write that part.
        losses: It has a loss whose form must be the same on all ranks.
        form: That form as a number, see `LossForms`.
        form_squared: The square of that number.
    """

    commands: float = 0
    exhausted: float = 0
    snapshot: float = 0
    checkpoint: float = 0
    written: float = 0
    unwritten: float = 0
    losses: float = 0
    form: float = 0
    form_squared: float = 0


_NO_FLAGS = ControlFlags()
_SUMS = 3
COUNTS = _SUMS + len(ControlFlags._fields)
"""Numbers all-reduced behind the gradients: the weight, the loss times its weight, that weight, and the flags."""
_NO_LOSS = (0.0, 0.0)


class Totals:
    """Sums of one step over all ranks: loss, weights, flags. On a GPU, reading the first one waits for the copy.

    Args:
        sums: ``(COUNTS,)``, on the channel's device.
    """

    def __init__(self, sums: torch.Tensor) -> None:
        self._copied: Any = None
        if sums.device.type == "cuda":
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._sums = sums.clone()

    @functools.cached_property
    def _numbers(self) -> list[float]:
        while self._copied is not None and not self._copied.query():
            time.sleep(_POLL_S)  # polled, so that an interrupt gets through: if a peer died, the event never completes
        return self._sums.tolist()

    @property
    def weight(self) -> float:
        """Sum of the slices' weights, in `Strategy.units`; zero if no rank had data."""
        return self._numbers[0]

    @property
    def loss_weight(self) -> float:
        """What the loss is a mean over."""
        return self._numbers[2]

    @property
    def loss(self) -> float | None:
        """The mean loss over all ranks; None if no rank had data."""
        _, total, weight = self._numbers[:_SUMS]
        return total / weight if weight else None

    @property
    def flags(self) -> ControlFlags:
        """How many ranks set each flag."""
        return ControlFlags(*self._numbers[_SUMS:])


def tail_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of a step's totals beside gradients of `dtypes`; half precision could not count exactly."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@dataclass
class _Bucket:
    """A contiguous range of a flat buffer, all-reduced as one; `missing` gradients are not computed yet."""

    flat: torch.Tensor
    members: list[int]
    missing: int = 0
    pending: Pending | None = None


class GradientSync:
    """Holds all gradients in flat buffers and sums them over a channel once a step.

    Each parameter's ``.grad`` is a view into a flat buffer, one per dtype, so backward accumulates in place and the
    sync is a few large collectives. The last buffer also carries the step's totals and which parameters were used, so
    stopping together and skipping unused parameters cost no collective of their own.

    If the sync overlaps with backward, gradients stay where backward allocated them until their bucket is complete.
    Then one call copies all of them into it: accumulating in place would be a kernel for each. A single rank copies
    none.

    Gradients are sums of ``weight / full_batch * d loss`` over the slices, divided in the end by the sum of those
    factors over all ranks unless that is one: exact for uneven slices, and for means over tokens. Ranks sum the
    weights themselves: most are counts, whose sum has the same bits in any order.

    Args:
        parameters: Trainable parameters, on the channel's device.
        channel: The axis to sum over.
        full_batch: The weight of a full global batch, after which gradients need no division.
        bucket_mib: Largest bucket in MiB if the sync overlaps with backward.
        overlap: Whether buckets start while backward still runs. It pays if the collective runs beside the
            computation, as with NCCL. None: on a GPU only.
    """

    def __init__(
        self, parameters: list[nn.Parameter], channel: Channel, *, full_batch: float = 1.0, bucket_mib: float = 25.0,
        overlap: bool | None = None,
    ) -> None:  # fmt: skip
        self._parameters = parameters
        self._channel = channel
        self._full_batch = full_batch
        self._overlap = channel.device.type == "cuda" if overlap is None else overlap
        self._single = self._overlap and channel.size == 1
        self._used: list[Any] = [None] * len(parameters)
        self._armed = False
        self._buckets: list[_Bucket] = []
        self._views: list[torch.Tensor] = [torch.empty(0)] * len(parameters)
        self._bucket_of: list[int] = [0] * len(parameters)
        self._flats: list[torch.Tensor] = []
        self._tail_values: list[Any] = []
        self._tail_source = torch.empty(0)
        self._tail = self._lay_out(bucket_mib * 2**20 if self._overlap else float("inf"))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(i)) for i, parameter in enumerate(parameters)
        ]

    def _lay_out(self, bucket_bytes: float) -> torch.Tensor:
        """Make flat buffers, parameters in reverse (the order in which backward reaches them); return the tail."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in reversed(range(len(self._parameters))):
            by_dtype.setdefault(self._parameters[i].dtype, []).append(i)
        tail_type = tail_dtype(by_dtype)  # its buffer is the last one
        by_dtype[tail_type] = by_dtype.pop(tail_type, [])
        tail = COUNTS + len(self._parameters)
        if self._single:
            self._flats.append(self._channel.zeros(tail, tail_type))
            return self._flats[0]
        for dtype, members in by_dtype.items():
            length = sum(self._parameters[i].numel() for i in members)
            extra = tail if dtype is tail_type else 0
            flat = self._channel.zeros(length + extra, dtype)
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
        return self._flats[-1][-tail:]

    def _hook(self, i: int) -> Any:
        if not self._overlap:
            return functools.partial(self._used.__setitem__, i)  # a C function: no Python frame in backward

        def hook(parameter: nn.Parameter) -> None:
            self._used[i] = parameter
            if self._armed and not self._single:
                self._buckets[self._bucket_of[i]].missing -= 1
                self._start_ready()

        return hook

    def zero_(self) -> None:
        """Clear all gradients at the start of a step. Local."""
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

    def arm(self) -> None:
        """Call before this rank's last backward of the step: its buckets may start when complete. Local."""
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
                bucket.pending = self._channel.start_all_reduce_(bucket.flat)

    def _fill(self, bucket: _Bucket) -> None:
        """Copy the gradients of a bucket into it; from now on they are views of it."""
        made = [self._parameters[i].grad for i in bucket.members]
        places = [self._views[i] for i in bucket.members]
        copy_or_zero_(places, [g.to_dense() if g is not None and g.is_sparse else g for g in made])
        for i, place in zip(bucket.members, places, strict=True):
            self._parameters[i].grad = place

    @property
    def used(self) -> list[bool]:
        """Which parameters have got a gradient on this rank in this step. Local."""
        return [hit is not None for hit in self._used]

    def finish(
        self,
        weight: Any,
        flags: ControlFlags = _NO_FLAGS,
        *,
        loss: tuple[Any, Any] = _NO_LOSS,
        used: list[bool] | None = None,
    ) -> Totals:
        """End a step: sum over the ranks and divide by the total weight. **Collective**.

        Args:
            weight: Sum of this rank's slice weights, a number or a scalar tensor.
            flags: This rank's flags, or their sums over its replica.
            loss: Sum of its losses times their weights, and of those weights; numbers or scalar tensors.
            used: Which parameters the replica used; by default those of this rank.
        """
        if not self._armed:
            self.arm()
        self._armed = False
        used = self.used if used is None else used
        self._write_tail([weight, *_NO_LOSS, *flags, *used], loss)
        self._start_ready(everything=True)
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait_on_device()
            bucket.pending = None  # a finished work object would keep its process group, and so its connections, alive
        totals = Totals(self._tail[:COUNTS])
        if self._single and not isinstance(weight, torch.Tensor):
            factor: Any = weight / self._full_batch
        elif self._tail.device.type == "cpu":
            factor = totals.weight / self._full_batch
        else:  # computed on the GPU: reading totals.weight would wait for it
            factor = torch.where(self._tail[0] == 0, 1.0, self._tail[0] / self._full_batch)
        if isinstance(factor, torch.Tensor) or factor not in (0.0, 1.0):
            held = [p.grad for p in self._parameters if p.grad is not None] if self._single else self._flats
            if held:
                torch._foreach_div_(held, factor)
        if not (all(used) or self._single):
            self._drop_unused()
        return totals

    def _write_tail(self, values: list[Any], loss: tuple[Any, Any]) -> None:
        """Write the tail. Its numbers are mostly those of the previous step, and then nothing is copied to a GPU."""
        values[2] = loss[1]
        apart = {1: loss[0], **{place: values[place] for place in (0, 2) if isinstance(values[place], torch.Tensor)}}
        for place in apart:
            values[place] = 0.0
        if values != self._tail_values:
            self._tail_values, self._tail_source = (
                values,
                torch.tensor(values, dtype=self._tail.dtype, device=self._tail.device),
            )
        self._tail.copy_(self._tail_source)
        for place, number in apart.items():
            self._tail[place] = number

    def _drop_unused(self) -> None:
        """Set the gradient of parameters that no rank used to None, as in one process: no decay or momentum moves them.

        A rank that used every parameter itself need not read the counts.
        """
        counts = self._tail[COUNTS:].tolist()
        for parameter, count in zip(self._parameters, counts, strict=True):
            if count == 0:
                parameter.grad = None

    def close(self) -> None:
        """Release the parameters: remove hooks, gradients and buffers. Local."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None
        for flat in self._flats:
            self._channel.free(flat)
        self._flats, self._views, self._buckets = [], [], []
        self._tail = torch.empty(0)
