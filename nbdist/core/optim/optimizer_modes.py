"""The modes of optimizers that have two, as schedule-free ones do: they train other weights than they evaluate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

__all__ = ["evaluating", "set_mode"]


def set_mode(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Call ``optimizer.train()`` or ``optimizer.eval()``, if it has both. Local: it changes this rank's weights."""
    methods = [getattr(optimizer, name, None) for name in ("eval", "train")]
    if all(map(callable, methods)):
        methods[training]()  # type: ignore[misc]


@contextlib.contextmanager
def evaluating(optimizers: Iterable[torch.optim.Optimizer], take_values: Callable[[], None]) -> Iterator[None]:
    """Context in which the weights are those to evaluate. Local; no rank may need the others' weights at its end.

    Args:
        optimizers: Those that have modes, and others.
        take_values: Called after they have written weights, see `Strategy.take_values`.
    """
    every = list(optimizers)
    for optimizer in every:
        set_mode(optimizer, training=False)
    take_values()
    try:
        yield
    finally:
        for optimizer in every:
            set_mode(optimizer, training=True)
        take_values()
