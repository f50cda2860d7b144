"""Small models and data to train, for as long as a test wants."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

FEATURES, CLASSES = 6, 3


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers with a BatchNorm between them, so that there are buffers too; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, dtype=dtype), nn.Tanh(), nn.Linear(8, CLASSES)]
        return nn.Sequential(*layers).to(dtype)


def classes(samples: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random samples and class numbers, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Whether weights and buffers are bit for bit those of `state`."""
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def rows(fail_at: int = -1, samples: int = 64) -> Dataset[Any]:
    """A map-style data set that cannot read one of its samples.

    Its class is made here, so that it travels by value: the engines do not know this module.
    """

    class Rows(Dataset):
        def __len__(self):
            return samples

        def __getitem__(self, index):
            if index == fail_at:
                raise ValueError(f"sample {index} is torn")
            return torch.full((FEATURES,), index / samples), index % CLASSES

    return Rows()


def process_of_each_rank() -> Any:
    """A loss that prints the process that computes it."""

    def loss(output, target):
        print(os.getpid())
        return nn.functional.cross_entropy(output, target)

    return loss
