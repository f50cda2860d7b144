"""The step's log: numbers that a step names beside its loss, as weighted means over slices and ranks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from nbdist.core.comm import Channel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.sync.agreement import ControlFlags, first_of_all
from nbdist.core.sync.running_mean import RunningMean
from nbdist.core.sync.step_tail import LogTotals
from nbdist.errors import TaskError
from nbdist.plan import Plan

__all__ = ["LOG_HOW", "LogReducer", "StepLog"]

LOG_HOW = 'log is a dict of numbers by name, as in log = {"kl": kl.mean()}'
_RESERVED = ("epoch", "steps", "samples", "loss", "seconds")
_MOST = 64
_MANY = (
    f"a run logs at most {_MOST} numbers, each with a curve of its own, and here are more, such as {{name!r}}: log "
    "fewer, such as means of them."
)

_CPU = torch.device("cpu")
Means = dict[str, dict[int, RunningMean]]
"""By name, and by the index of the slice."""


class StepLog:
    """Collects what the slices of this rank log in a step, or in an evaluation. Local."""

    def __init__(self) -> None:
        self._means: Means = {}
        self._first = 0

    def begin(self) -> None:
        """Forget what was collected."""
        self._means, self._first = {}, 0

    def begin_batch(self, first: int) -> None:
        """Go on with another batch, whose slices have the indices from `first` on."""
        self._first = first

    def add(
        self, given: Mapping[Any, Any], index: int, weight: Any, *, of: str = "log",
        reserved: Collection[str] = _RESERVED,
    ) -> None:  # fmt: skip
        """Add the log of one slice.

        Args:
            given: Numbers, or tensors of one element, by name: means over what the loss is a mean over.
            index: Of the slice.
            weight: Of its loss; with zero only the names count.
            of: What the user calls it.
            reserved: Names that mean something else where this one would stand.

        Raises:
            TaskError: A name or a value cannot be used.
        """
        for name, value in given.items():
            if not isinstance(name, str) or not name:
                raise TaskError(f"{of} has a value under {name!r}: give names, as in {{'kl': kl.mean()}}.")
            if name in reserved or name.startswith("val_"):
                raise TaskError(f"{of} has a value under {name!r}, which a history has already: use another name.")
            number = _number(f"{of}[{name!r}]", value)
            means = self._means.setdefault(name, {})
            if isinstance(weight, torch.Tensor) or weight:
                device = next((one.device for one in (number, weight) if isinstance(one, torch.Tensor)), _CPU)
                means.setdefault(self._first + index, RunningMean(device)).add(number, weight)
        if len(self._means) > _MOST:
            raise TaskError(_MANY.format(name=next(reversed(self._means))))

    def take(self) -> Means:
        """What was collected since the last call."""
        taken, self._means = self._means, {}
        return taken

    def means(self) -> dict[str, float]:
        """The weighted means of what was collected, on this rank alone. Waits for a GPU."""
        means = {}
        for name, by_slice in self.take().items():
            total, weight = (sum(float(mean.parts[i]) for mean in by_slice.values()) for i in (0, 1))
            if weight:
                means[name] = total / weight
        return means

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Context whose slices are not collected."""
        means, self._means = self._means, {}
        try:
            yield
        finally:
            self._means = means


class LogReducer:
    """Sums the logs of all ranks, once a step if there are any.

    Names may differ from rank to rank and from step to step: a flag, which rides on the gradient sync, says that a rank
    has new ones, and then all agree on them.

    Args:
        log: Of this rank.
        channel: Over all ranks.
        slices: Of a batch, if sums must have the same bits on any number of ranks; else 0.
        counts: Whether this rank's log counts: one of those that run the same slices does.
    """

    def __init__(self, log: StepLog, channel: Channel, *, slices: int, counts: bool) -> None:
        self._log, self._channel, self._slices, self._counts = log, channel, slices, counts
        self._names: tuple[str, ...] = ()
        self._waiting: dict[str, dict[int, RunningMean]] = {}

    @classmethod
    def of(cls, log: StepLog, axes: MeshChannels, plan: Plan, *, batches: int = 1) -> LogReducer:
        """That of a rank; under `reproducible` sums are by slice, of so many batches together."""
        return cls(log, axes.world, slices=plan.slices * batches if plan.reproducible else 0, counts=axes.reports_loss)

    def flags(self, own: ControlFlags) -> ControlFlags:
        """The flags, with that of a new name. Local."""
        taken = self._log.take()
        for name, by_slice in taken.items() if self._counts else ():
            rows = self._waiting.setdefault(name, {})
            for index, mean in by_slice.items():
                rows.setdefault(index if self._slices else 0, RunningMean(self._channel.device)).add_sums(*mean.parts)
        unknown = not self._waiting.keys() <= {*self._names}
        return own._replace(names=1) if unknown else own

    def reduce(self, agreed: ControlFlags | None) -> LogTotals | None:
        """Sum what was collected since the last call. **Collective**, after the same steps on all ranks.

        Args:
            agreed: The newest summed flags, the same on all ranks; None before there are any.

        Returns:
            The sums; None if no rank has ever logged anything.

        Raises:
            TaskError: There are too many names; on all ranks alike.
        """
        if agreed is not None and agreed.names:
            self._agree()
        if not self._names:
            return None
        table = self._table()
        self._channel.start_all_reduce_(table).wait_on_device()
        return LogTotals(self._names, table.sum(0) if self._slices else table[0])

    def _agree(self) -> None:
        while True:  # mostly all ranks have the same names, so once
            own = [name for name in self._waiting if name not in self._names]
            found = first_of_all(json.dumps(own).encode() if own else b"", self._channel)
            if not found:
                return
            self._names += tuple(json.loads(found))
            if len(self._names) > _MOST:
                raise TaskError(_MANY.format(name=self._names[-1]))

    def _table(self) -> torch.Tensor:
        """``(slices or 1, names, 2)``: each entry is zero on all ranks but one, if sums are by slice."""
        device = self._channel.device
        shape = (max(self._slices, 1), len(self._names), 2)
        by_name = [self._waiting.pop(name, {}) for name in self._names]
        if device.type == "cpu":
            numbers = [[rows[row].parts if row in rows else (0.0, 0.0) for rows in by_name] for row in range(shape[0])]
            return torch.tensor(numbers, dtype=torch.float64)
        table = torch.zeros(shape, dtype=torch.float64, device=device)
        for column, rows in enumerate(by_name):
            for row, mean in rows.items():
                table[row, column, 0], table[row, column, 1] = mean.parts  # no copy from the host, which would wait
        return table


def _number(what: str, value: Any) -> Any:
    """A number, or on a GPU a scalar tensor of its own, without its graph."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            kind = f"a tensor of shape {tuple(value.shape)}" if value.numel() != 1 else "a complex number"
            end = ": end it with .mean()" if value.numel() > 1 else ": a real number is meant"
            raise TaskError(f"{what} is {kind}{end}.")
        if value.device.type == "cpu":
            return value.item()
        return value.detach().to(torch.float64, copy=True).reshape(())
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, (Real, np.number)):
        return float(value)
    raise TaskError(f"{what} is a value of type {type(value).__name__}: give a number, or a tensor of one element.")
