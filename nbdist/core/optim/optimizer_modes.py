"""The modes of optimizers that have two, as schedule-free ones do: they train other weights than they evaluate."""

from __future__ import annotations

import torch

__all__ = ["set_mode"]


def set_mode(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Call ``optimizer.train()`` or ``optimizer.eval()``, if it has both. Local: it changes this rank's weights."""
    methods = [getattr(optimizer, name, None) for name in ("eval", "train")]
    if all(map(callable, methods)):
        methods[training]()  # type: ignore[misc]
