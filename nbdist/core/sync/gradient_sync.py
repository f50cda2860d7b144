"""Gradient synchronisation: flat, weighted, and overlapping with backward where that pays."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nbdist.core.comm import Channel, Pending
from nbdist.core.params.table import copy_or_zero_, laid_out_like

__all__ = ["COUNTS", "ControlFlags", "GradientSync", "Totals", "tail_dtype"]

_NAP_S = 5e-5


class ControlFlags(NamedTuple):
    """What a rank says at the end of a step, as zeros and ones; of all ranks, how many say it.

    Args:
        commands: It has commands for all, see `StepControl`.
        exhausted: It has no data left.
        snapshot: It asks all to keep the state after this step.
        checkpoint: It asks all to write the state after this step to disk.
        written: Its part of the checkpoint under way lies on disk.
        unwritten: It could not write that part.
        losses: It has seen a loss whose form all have to share.
        form: That form as a number, see `LossForms`.
        form_squared: And the square of it.
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


_SILENT = ControlFlags()
_SUMS = 3
COUNTS = _SUMS + len(ControlFlags._fields)
"""Numbers that ride behind the gradients: the weight, the loss times its weight, that weight, and the signals."""
_NOTHING = (0.0, 0.0)


class Totals:
    """What one step adds up to over all ranks. On a GPU it is on its way until one of its numbers is asked for.

    Args:
        sums: ``(COUNTS,)``, on the channel's device.
    """

    def __init__(self, sums: torch.Tensor) -> None:
        self._arrived: Any = None
        if sums.device.type == "cuda":
            self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            self._sums.copy_(sums, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._sums = sums.clone()

    @functools.cached_property
    def _numbers(self) -> list[float]:
        while self._arrived is not None and not self._arrived.query():
            time.sleep(_NAP_S)  # polled, for a peer may be gone and this never come
        return self._sums.tolist()

    @property
    def weight(self) -> float:
        """Sum of the slices' weights, in `Strategy.units`; zero where no rank had data."""
        return self._numbers[0]

    @property
    def loss_weight(self) -> float:
        """What the loss is a mean over."""
        return self._numbers[2]

    @property
    def loss(self) -> float | None:
        """The loss over all ranks; None where none had data."""
        _, total, weight = self._numbers[:_SUMS]
        return total / weight if weight else None

    @property
    def flags(self) -> ControlFlags:
        """How many ranks say what."""
        return ControlFlags(*self._numbers[_SUMS:])


def tail_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What a step's totals are counted in, among gradients of `dtypes`: one that can count."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@dataclass
class _Bucket:
    """A contiguous range of a flat buffer, reduced as one; `missing` gradients are still to come in this step."""

    flat: torch.Tensor
    members: list[int]
    missing: int = 0
    pending: Pending | None = None


class GradientSync:
    """Holds all gradients in flat buffers and sums them over a channel once a step.

    Each parameter's ``.grad`` is a view into a flat buffer, one a dtype, so backward accumulates in place and the
    sync is a few large collectives. Behind the gradients of the last buffer ride the step's totals and which
    parameters were used: stopping together and leaving unused parameters alone cost no collective of their own.

    Where the sync overlaps with backward, the gradients stay where backward has made them until a bucket of them is
    full, and are copied into it at once: an addition for each would be a kernel for each. A rank alone leaves them.

    Gradients are sums of ``weight / full_batch * d loss`` over the slices, divided in the end by the sum of those
    factors over all ranks unless that is one: exact for uneven slices, and for means over tokens. What is summed over
    ranks are the weights themselves: most are counts, whose sum has the same bits in any order.

    Args:
        parameters: Trainable parameters, on the channel's device.
        channel: The axis to sum over.
        full_batch: The usual weight of a global batch, after which nothing is left to divide.
        bucket_mib: Largest bucket in MiB where the sync overlaps with backward.
        overlap: Whether buckets start while backward still runs. It pays where the collective runs beside the
            computation, as with NCCL; None decides by the device.
    """

    def __init__(
        self, parameters: list[nn.Parameter], channel: Channel, *, full_batch: float = 1.0, bucket_mib: float = 25.0,
        overlap: bool | None = None,
    ) -> None:  # fmt: skip
        self._parameters = parameters
        self._channel = channel
        self._full_batch = full_batch
        self._overlap = channel.device.type == "cuda" if overlap is None else overlap
        self._alone = self._overlap and channel.size == 1
        self._used: list[Any] = [None] * len(parameters)
        self._armed = False
        self._buckets: list[_Bucket] = []
        self._views: list[torch.Tensor] = [torch.empty(0)] * len(parameters)
        self._bucket_of: list[int] = [0] * len(parameters)
        self._flats: list[torch.Tensor] = []
        self._told: list[Any] = []
        self._said = torch.empty(0)
        self._tail = self._lay_out(bucket_mib * 2**20 if self._overlap else float("inf"))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(i)) for i, parameter in enumerate(parameters)
        ]

    def _lay_out(self, bucket_bytes: float) -> torch.Tensor:
        """Fill flat buffers with the parameters in reverse, the order backward meets them, and return the tail."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in reversed(range(len(self._parameters))):
            by_dtype.setdefault(self._parameters[i].dtype, []).append(i)
        carrier = tail_dtype(by_dtype)  # its buffer comes last
        by_dtype[carrier] = by_dtype.pop(carrier, [])
        tail = COUNTS + len(self._parameters)
        if self._alone:
            self._flats.append(self._channel.zeros(tail, carrier))
            return self._flats[0]
        for dtype, members in by_dtype.items():
            length = sum(self._parameters[i].numel() for i in members)
            extra = tail if dtype is carrier else 0
            flat = self._channel.zeros(length + extra, dtype)
            self._flats.append(flat)
            start = offset = 0
            full: list[int] = []
            for i in members:
                parameter = self._parameters[i]
                if full and (offset + parameter.numel() - start) * flat.itemsize > bucket_bytes:
                    self._buckets.append(_Bucket(flat[start:offset], full))
                    start, full = offset, []
                self._views[i] = laid_out_like(parameter, flat, offset)
                self._bucket_of[i] = len(self._buckets)
                offset += parameter.numel()
                full.append(i)
            self._buckets.append(_Bucket(flat[start:], full))
        return self._flats[-1][-tail:]

    def _hook(self, i: int) -> Any:
        if not self._overlap:
            return functools.partial(self._used.__setitem__, i)  # no Python frame on the way of backward

        def hook(parameter: nn.Parameter) -> None:
            self._used[i] = parameter
            if self._armed and not self._alone:
                self._buckets[self._bucket_of[i]].missing -= 1
                self._start_ready()

        return hook

    def zero_(self) -> None:
        """Begin a step: no gradients. Local."""
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
        """The next backward is the step's last on this rank: buckets may start as they fill up. Local."""
        for bucket in self._buckets:
            bucket.missing, bucket.pending = len(bucket.members), None
        self._armed = self._overlap

    def _start_ready(self, everything: bool = False) -> None:
        """Start full buckets, always in the same order, for all ranks must agree on it; the last one ends the step."""
        for bucket in self._buckets if everything else self._buckets[:-1]:
            if bucket.pending is None:
                if bucket.missing and not everything:
                    return
                if self._overlap:
                    self._take_in(bucket)
                bucket.pending = self._channel.start_all_reduce_(bucket.flat)

    def _take_in(self, bucket: _Bucket) -> None:
        """Copy what backward has made into a bucket, where the gradients are from now on."""
        made = [self._parameters[i].grad for i in bucket.members]
        places = [self._views[i] for i in bucket.members]
        copy_or_zero_(places, [g.to_dense() if g is not None and g.is_sparse else g for g in made])
        for i, place in zip(bucket.members, places, strict=True):
            self._parameters[i].grad = place

    @property
    def used(self) -> list[bool]:
        """Which parameters have got a gradient in this step, on this rank. Local."""
        return [hit is not None for hit in self._used]

    def finish(
        self,
        weight: Any,
        flags: ControlFlags = _SILENT,
        *,
        loss: tuple[Any, Any] = _NOTHING,
        used: list[bool] | None = None,
    ) -> Totals:
        """End a step: sum over the ranks and divide by the total weight. **Collective**.

        Args:
            weight: Sum of this rank's slice weights, a number or a scalar tensor.
            flags: What this rank says, or the sums of the ranks that it speaks for.
            loss: Sum of its losses times their weights, and of those weights; numbers or scalar tensors.
            used: Which parameters were used, where this rank was told; by default it has seen it itself.
        """
        if not self._armed:
            self.arm()
        self._armed = False
        used = self.used if used is None else used
        self._tell([weight, *_NOTHING, *flags, *used], loss)
        self._start_ready(everything=True)
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait_on_device()
            bucket.pending = None  # a finished collective would still hold its process group, and the group its peers
        totals = Totals(self._tail[:COUNTS])
        if self._alone and not isinstance(weight, torch.Tensor):
            factor: Any = weight / self._full_batch
        elif self._tail.device.type == "cpu":
            factor = totals.weight / self._full_batch
        else:  # not waited for
            factor = torch.where(self._tail[0] == 0, 1.0, self._tail[0] / self._full_batch)
        if isinstance(factor, torch.Tensor) or factor not in (0.0, 1.0):
            held = [p.grad for p in self._parameters if p.grad is not None] if self._alone else self._flats
            if held:
                torch._foreach_div_(held, factor)
        if not (all(used) or self._alone):
            self._drop_unused()
        return totals

    def _tell(self, values: list[Any], loss: tuple[Any, Any]) -> None:
        """Write the tail. Mostly it says what it said in the step before, and then nothing is sent to a GPU."""
        values[2] = loss[1]
        apart = {1: loss[0], **{place: values[place] for place in (0, 2) if isinstance(values[place], torch.Tensor)}}
        for place in apart:
            values[place] = 0.0
        if values != self._told:
            self._told, self._said = values, torch.tensor(values, dtype=self._tail.dtype, device=self._tail.device)
        self._tail.copy_(self._said)
        for place, number in apart.items():
            self._tail[place] = number

    def _drop_unused(self) -> None:
        """Parameters that no rank used have no gradient, as in one process, so no decay or momentum moves them.

        A rank that used every parameter itself knows without looking that all were used.
        """
        counts = self._tail[COUNTS:].tolist()
        for parameter, count in zip(self._parameters, counts, strict=True):
            if count == 0:
                parameter.grad = None

    def close(self) -> None:
        """Let go of the parameters: no hooks and no gradients remain. Local."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None
        for flat in self._flats:
            self._channel.free(flat)
        self._flats, self._views, self._buckets = [], [], []
        self._tail = torch.empty(0)
