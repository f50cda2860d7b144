"""A model of the compatibility table, with its data, its loss or step, and how its cells are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a user trains.

    Args:
        make: The model, or a dict of several, which have an optimizer each.
        data: ``data(samples)``: tensors, a dict of them, or a DataLoader.
        loss: A name or a callable, as for `nbdist.train`.
        step: ``step(model, batch)`` in place of a loss; it may call `nbdist.update`. With neither, the model computes
            its loss from a dict.
        reduction: The option.
        optimizer: "sgd", "adamw", or "lbfgs", which computes a loss several times in a step.
        lr: Its rate.
        double: Whether model and data are float64; else float32.
        sliced: Whether the result depends on how a batch is cut, because of random numbers, statistics of a batch or
            buffers. The loop written by hand then cuts it as nbdist does; else it takes the whole batch.
        carries: Whether the step calls `nbdist.carried`.
        after: The option `after_step`.
        ema: The option.
        check: The option.
        split_at: Where a pipeline is cut; balanced by measured time if empty, which need not repeat.
        weigh: What the mean loss of a batch is over; by default its samples.
        tolerance: How far apart values may be; by default 1e-9 in float64 and 2e-5 in float32.
    """

    make: Callable[[], Any]
    data: Callable[[int], Any]
    loss: Any = None
    step: Callable[[nn.Module, Any], Any] | None = None
    reduction: str = "mean"
    optimizer: str = "sgd"
    lr: float = 0.05
    double: bool = True
    sliced: bool = False
    carries: bool = False
    after: Callable[[nn.Module], None] | None = None
    ema: float | None = None
    check: str = "yes"
    split_at: str = ""
    weigh: Callable[[Any], float] | None = None
    tolerance: float = 0.0

    def model(self) -> Any:
        """The same weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
        for module in model.values() if isinstance(model, dict) else [model]:
            module.to(torch.float64 if self.double else None)
        return model

    def samples(self, count: int) -> Any:
        """The same samples each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            data = self.data(count)
        return converted(data, torch.float64) if self.double else data


def converted(data: Any, dtype: torch.dtype) -> Any:
    """Data whose floating-point tensors are of a type; a DataLoader stays as it is."""
    if isinstance(data, torch.Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, (tuple, list)):
        return type(data)(converted(value, dtype) for value in data)
    return {name: converted(value, dtype) for name, value in data.items()} if isinstance(data, dict) else data
