"""Small problems to train on, and one way to train them on any number of ranks."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbdist.core import Result, fit
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.control.commands import Command, Commands
from nbdist.core.task.task import Task
from nbdist.plan import Plan

FEATURES, CLASSES = 6, 3

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}


def classes(samples: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random samples and random class numbers, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


def seeded(make: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A module whose weights are always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(dtype)


def mlp(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    """Two layers, with dropout in between where asked."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES)), dtype
    )


class Given(Commands):
    """Commands given in certain steps, counted from 1; their stamps are kept.

    Args:
        by_step: The kinds, or kinds and values, of those of each step; 0 is before the first one.
    """

    def __init__(self, by_step: dict[int, list[Any]]) -> None:
        self.by_step = by_step
        self.asked = 0
        self.stamps: list[tuple[int, int]] = []

    def new(self) -> list[Command]:
        """See `Commands`."""
        given = self.by_step.get(self.asked, [])
        self.asked += 1
        return [Command(one) if isinstance(one, str) else Command(*one) for one in given]

    def stamp(self, number: int, step: int) -> None:
        """See `Commands`."""
        self.stamps.append((number, step))


def stop_after(step: int) -> Given:
    """A stop after a step."""
    return Given({step: ["stop"]})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(world: World, model: Any, data: Any, **options: Any) -> tuple[Result, dict[str, torch.Tensor]]:
    """Train as `nbdist.train` would, on one thread, and return the result and the weights."""
    supplied = {
        "loss",
        "step",
        "optimizer",
        "lr",
        "lr_scheduler",
        "val",
        "metric",
        "evaluate",
        "after_step",
        "each_epoch",
        "batch_size",
        "shuffle",
        "reduction",
    }
    if "step" not in options:
        options.setdefault("loss", "cross_entropy")
    task = Task.create(model, data, **{k: v for k, v in options.items() if k in supplied})
    return train_task(world, task, **{k: v for k, v in options.items() if k not in supplied}), weights(task.model)


def train_task(world: World, task: Task, **options: Any) -> Result:
    """`train` a task."""
    passed = {"sinks", "commands", "run_id", "snapshot_paths", "from_snapshot"}
    rest = {k: v for k, v in options.items() if k not in passed}
    plan = Plan.create(ranks=world.size, cores=1, threads=1, **rest, **task.options)
    return fit(task, plan, world, **{k: v for k, v in options.items() if k in passed})


def alone(model: nn.Module, data: Any, **options: Any) -> tuple[Result, dict[str, torch.Tensor]]:
    """`train` in this process, on one rank."""
    return train(World(), model, data, **options)


def strategy_of(kind: Any, world: World, model: nn.Module, full_batch: int = 1, **options: Any) -> Any:
    """A data-parallel strategy of a kind, for `model` and some task."""
    bucket_mib = options.pop("bucket_mib", None)
    task = Task.create(model, classes(full_batch * world.size), loss="cross_entropy", optimizer="sgd")
    plan = Plan.create(ranks=world.size, cores=1, bucket_mib=bucket_mib, **task.options | {"batch_size": world.size})
    return kind(task, replace(plan, batch_size=max(full_batch, world.size)), MeshChannels(world, plan.mesh), **options)


def losses(result: Result) -> list[float]:
    """The training loss of each epoch."""
    return [row["loss"] for row in result.history]


def assert_same_bits(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    """Compare two dicts of tensors bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
