"""The tail of a step: the numbers that ranks sum beside the gradients, their order, and what the sums say."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from nbdist.core.sync.agreement import ControlFlags
from nbdist.core.sync.running_mean import RunningMean
from nbdist.errors import TaskError

__all__ = ["LOSS_NUMBERS", "LogTotals", "StepLosses", "StepTail", "Totals", "tail_dtype"]

_POLL_S = 5e-5
LOSS_NUMBERS = 3
"""Numbers of a loss in the tail: the weight in units (see `Strategy.units`), the loss, its own weight."""


class StepLosses:
    """The losses of this rank's slices in a step, without the slices that do not count.

    Args:
        device: Of the losses.

    Attributes:
        each: Index of the slice, loss and weight, and the weight in units. Numbers, or on a GPU scalar tensors.
        units: The sum of the weights in units; a number, or a scalar tensor on a GPU.
        mean: The weighted mean.
    """

    def __init__(self, device: torch.device) -> None:
        self.each: list[tuple[int, Any, Any, Any]] = []
        self.units: Any = 0
        self.mean = RunningMean(device)
        self._on_cpu = device.type == "cpu"

    def add(self, index: int, loss: torch.Tensor, weight: Any, units: Any) -> None:
        """Add the loss of a slice."""
        number = loss.item() if self._on_cpu else loss.detach()
        self.each.append((index, number, weight, units))
        self.units = self.units + units
        self.mean.add(number, weight)

    @property
    def any_known(self) -> bool:
        """Whether this rank had data, as far as is known without waiting for a GPU."""
        return not isinstance(self.units, torch.Tensor) and self.units > 0

    def check_finite(self, step: int) -> None:
        """Raise `TaskError` if a loss of this step, counted from 1, is not finite. On a GPU this waits for it."""
        for _, loss, *_ in self.each:
            if not math.isfinite(loss):
                raise TaskError(
                    f"the loss is {float(loss)} in step {step}: lower the learning rate, clip the gradient "
                    "(clip_norm), or look at the data of this step."
                )

    @property
    def numbers(self) -> tuple[Any, Any, Any]:
        """Their `LOSS_NUMBERS`, the loss times its weight; numbers or scalar tensors."""
        return (self.units, *self.mean.parts)


class AsyncNumbers:
    """Numbers that are read later: on a GPU they are copied meanwhile, and reading waits for that copy alone.

    Args:
        numbers: A list, or a tensor of one dimension.
    """

    def __init__(self, numbers: list[float] | torch.Tensor) -> None:
        self._read: list[float] | None = None
        if isinstance(numbers, torch.Tensor) and numbers.device.type == "cuda":
            self._host: Any = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._read = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers

    def read(self) -> list[float]:
        """The numbers."""
        if self._read is None:
            while not self._copied.query():
                time.sleep(_POLL_S)  # polled, so that an interrupt gets through: a dead peer's event never completes
            self._read = self._host.tolist()
        return self._read


class Totals:
    """Sums of one step over all ranks: loss, weights, flags. On a GPU, reading the first one waits for the copy.

    Args:
        sums: `LOSS_NUMBERS` with the loss times its weight, then the flags: numbers, or a tensor.

    Attributes:
        log: The sums of the step's log; None before any rank has logged anything. The loop sets it.
    """

    def __init__(self, sums: list[float] | torch.Tensor) -> None:
        self._sums = sums
        self._numbers = AsyncNumbers(sums)
        self.log: LogTotals | None = None

    @property
    def weight(self) -> float:
        """Sum of the slices' weights, in `Strategy.units`; zero if no rank had data."""
        return self._numbers.read()[0]

    @property
    def loss_weight(self) -> float:
        """What the loss is a mean over."""
        return self._numbers.read()[2]

    @property
    def loss(self) -> float | None:
        """The mean loss over all ranks; None if no rank had data."""
        _, total, weight = self._numbers.read()[:LOSS_NUMBERS]
        return total / weight if weight else None

    @property
    def parts(self) -> tuple[Any, Any]:
        """The sum of the losses times their weights, and of the weights: numbers, or scalar tensors of a GPU."""
        sums = self._sums
        if isinstance(sums, torch.Tensor) and sums.device.type != "cpu":
            _, total, weight = sums[:LOSS_NUMBERS].double().unbind()
            return total, weight
        return self._numbers.read()[1], self._numbers.read()[2]

    @property
    def flags(self) -> ControlFlags:
        """How many ranks set each flag."""
        return ControlFlags(*self._numbers.read()[LOSS_NUMBERS:])


class LogTotals:
    """The sums of one step's log over all ranks. On a GPU, reading `means` waits for the copy.

    Args:
        names: In the order of the sums.
        sums: ``(names, 2)`` in float64, on the device: value times weight, and weight.

    Attributes:
        parts: Both sums by name: numbers, or on a GPU scalar tensors.
    """

    def __init__(self, names: tuple[str, ...], sums: torch.Tensor) -> None:
        rows: Any = sums.tolist() if sums.device.type == "cpu" else (row.unbind() for row in sums)
        self.parts: dict[str, tuple[Any, Any]] = {name: tuple(row) for name, row in zip(names, rows, strict=True)}
        self._numbers = AsyncNumbers(sums.flatten())

    @property
    def means(self) -> dict[str, float]:
        """The mean of each name that any slice has logged."""
        numbers = self._numbers.read()
        pairs = zip(self.parts, numbers[::2], numbers[1::2], strict=True)
        return {name: total / weight for name, total, weight in pairs if weight}


class StepTail:
    """The order of a tail's numbers, the only place that knows it.

    Args:
        parameters: How many parameters take a gradient.
        rows: Losses that ranks sum apart: one, or one for each slice of the batch.
        buffers: How many buffers ranks change together.
    """

    def __init__(self, parameters: int, *, rows: int = 1, buffers: int = 0) -> None:
        flags = rows * LOSS_NUMBERS
        used = flags + len(ControlFlags._fields)
        self._losses, self._flags, self._used = slice(flags), slice(flags, used), slice(used, used + parameters)
        self._buffers = slice(used + parameters, None)
        self.numel = used + parameters + buffers
        self._known: list[Any] = []
        self._source = torch.empty(0)

    def write(
        self, out: torch.Tensor, losses: Sequence[Any], flags: ControlFlags, used: Sequence[float],
        buffers: Sequence[float] = (),
    ) -> None:  # fmt: skip
        """Write a rank's tail. Local; does not wait for a GPU.

        Args:
            out: ``(numel,)``.
            losses: `LOSS_NUMBERS` of each row, one row after another: numbers or scalar tensors.
            flags: The rank's flags.
            used: Which parameters have a gradient here.
            buffers: How many slices changed each buffer here.
        """
        if out.device.type == "cpu":
            out.copy_(torch.tensor([*map(float, losses), *flags, *used, *buffers], dtype=out.dtype))
            return
        # Most numbers are those of the previous step, but for the losses: then nothing is copied to the GPU.
        apart = {i: x for i, x in enumerate(losses) if i % LOSS_NUMBERS == 1 or isinstance(x, torch.Tensor)}
        known = [*(0.0 if i in apart else x for i, x in enumerate(losses)), *flags, *used, *buffers]
        if known != self._known:
            self._known, self._source = known, torch.tensor(known, dtype=out.dtype, device=out.device)
        out.copy_(self._source)
        for i, x in apart.items():
            out[i] = x

    def totals(self, summed: torch.Tensor) -> Totals:
        """The totals in a summed tail of one row. Local."""
        return Totals(summed[: self._flags.stop])

    def losses(self, summed: torch.Tensor) -> torch.Tensor:
        """``(rows, LOSS_NUMBERS)``, a view."""
        return summed[self._losses].view(-1, LOSS_NUMBERS)

    def flags(self, summed: torch.Tensor) -> torch.Tensor:
        """``(flags,)``, a view."""
        return summed[self._flags]

    def used(self, summed: torch.Tensor) -> list[float]:
        """How many ranks have a gradient of each parameter. Waits for a GPU."""
        used: list[float] = summed[self._used].tolist()
        return used

    def buffers(self, summed: torch.Tensor) -> list[float]:
        """How many slices changed each buffer. Waits for a GPU."""
        changed: list[float] = summed[self._buffers].tolist()
        return changed


def tail_dtype(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """The dtype of a step's tail beside gradients of `dtypes`, if any; half precision could not count exactly."""
    return torch.float64 if torch.float64 in dtypes or not dtypes else torch.float32
