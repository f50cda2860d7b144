"""A file that tests load by its path, under a name that no other process can import; it fills a registry."""

from __future__ import annotations

from enum import Enum

import torch
from torch import nn

MADE: dict[str, nn.Module] = {}


class Mode(Enum):
    """Members with attributes."""

    FAST = 1, "fast"
    SLOW = 2, "slow"

    def __init__(self, number: int, word: str) -> None:
        self.number, self.word = number, word


class Layer(nn.Linear):
    """A layer that the registry knows."""

    count = 0

    def __init__(self, name: str) -> None:
        super().__init__(2, 2)
        self.name, self.mode = name, Mode.SLOW
        MADE[name] = self
        Layer.count += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As often as there are layers."""
        return super().forward(x) * len(MADE) * self.mode.number


def helper(x: torch.Tensor) -> torch.Tensor:
    """A function of the file."""
    return x + len(MADE)
