"""A library that enters what is made into registries of its own; tests import it by its name, here and on engines."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch
from torch import nn

LAYERS: dict[str, nn.Module] = {}
ORDER: list[nn.Module] = []
ALIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
WORDS = {"a": "word"}
FACTORS: dict[str, float] = {"of another": 3.0}


class Layer(nn.Module):
    """A layer that is found again by its name."""

    scales: ClassVar[dict[str, nn.Parameter]] = {}

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.line = name, nn.Linear(2, 2)
        LAYERS[name] = self
        ORDER.append(self)
        ALIVE.add(self)
        Layer.scales[name] = self.line.weight
        FACTORS[str(type(self))] = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By way of the registry; as often as there are layers, and by what is entered for its class."""
        return LAYERS[self.name].line(x) * len(ORDER) * FACTORS.get(str(type(self)), 1.0)
