"""Two modules that one step trains, each with an optimizer and a scheduler of its own; and the same by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from problems import ADAMW, CLASSES, FEATURES, SGD, classes, seeded
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from nbdist.core.task.task import Task

WIDTH, SAMPLES, BATCH, EPOCHS = 8, 40, 16, 3
OPTIMIZERS = {"body": SGD, "head": ADAMW}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "body": functools.partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "head": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.9),
}


def pair(dropout: float = 0.0) -> dict[str, nn.Module]:
    """Two modules in float64, always the same ones."""

    def layers(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, outputs))

    return {
        "body": seeded(functools.partial(layers, FEATURES, WIDTH), torch.float64),
        "head": seeded(functools.partial(layers, WIDTH, CLASSES), torch.float64),
    }


def step(modules: dict[str, nn.Module], batch: Any) -> torch.Tensor:
    """A loss of both modules, which calls one of them twice."""
    x, y = batch
    hidden = modules["body"](x)
    return F.cross_entropy(modules["head"](hidden), y) + 0.1 * modules["head"](-hidden).square().mean()


def task_of(modules: dict[str, nn.Module], data: Any = None, **more: Any) -> Task:
    """The task of training both."""
    return Task.create(modules, classes(SAMPLES) if data is None else data, **given() | more)


def given() -> dict[str, Any]:
    """How both are trained, as options."""
    return {"step": step, "optimizer": OPTIMIZERS, "lr_scheduler": SCHEDULERS, "batch_size": BATCH, "shuffle": False}


def state_of(task: Task) -> dict[str, torch.Tensor]:
    """Weights and buffers, optimizer state and rates, copied."""
    found = {name: tensor.detach().clone() for name, tensor in task.model.state_dict().items()}
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    for name, optimizer in task.optimizers.items():
        found[name] = torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)
        for parameter, state in optimizer.state.items():
            found |= {f"{names[id(parameter)]}/{key}": value.clone() for key, value in state.items()}
    return found


@functools.cache
def by_hand(clip_norm: float | None = None) -> dict[str, torch.Tensor]:
    """Three epochs in plain PyTorch: what `state_of` gives after them."""
    modules = pair()
    task = task_of(modules)
    x, y = classes(SAMPLES)
    parameters = list(task.model.parameters())
    by_update, by_epoch = (SCHEDULERS[name](task.optimizers[name]) for name in ("body", "head"))
    for _ in range(EPOCHS):
        total = 0.0
        for rows in torch.arange(SAMPLES).split(BATCH):
            for optimizer in task.optimizers.values():
                optimizer.zero_grad()
            loss = step(modules, (x[rows], y[rows]))
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            for optimizer in task.optimizers.values():
                optimizer.step()
            by_update.step()
            total += loss.item() * len(rows) / SAMPLES
        by_epoch.step(total)
    return state_of(task)
