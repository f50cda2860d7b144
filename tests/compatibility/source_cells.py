"""Cells of the table of data: a form of data on a mesh beside a plain loop over the same batches."""

from __future__ import annotations

import functools
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent.parent),
    str(Path(__file__).parent.parent / "core"),
]

from cells import found_by, on_ranks
from problems import train
from sources import CASES, FEATURES
from torch import nn

from nbdist.core.comm.world import World

MESHES = ["dp=1", "dp=2", "dp=3", "tp=2", "dp=2,pp=2"]
EPOCHS = 2
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def model() -> nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def run_cell(world: World, name: str, mesh: str) -> Any:
    """The number of steps and the weights on a mesh. On one rank."""
    warnings.simplefilter("ignore")
    case, trained = CASES[name], model()
    options: dict[str, Any] = {"strategy": mesh, "step": case.step, "optimizer": SGD, **case.options}
    if "steps" not in options:
        options["epochs"] = EPOCHS
    if "pp" in mesh:
        options |= {"microbatches": 2, "split_at": ["1"]}
    result, weights = train(world, trained, case.make(), **options)
    return sum(row["steps"] for row in result.history), weights


@functools.cache
def by_hand(name: str) -> tuple[int, dict[str, torch.Tensor]]:
    """The same in plain PyTorch, in one process."""
    case, trained = CASES[name], model()
    data, optimizer, steps = case.make(), SGD(trained.parameters()), 0
    epochs = itertools.chain.from_iterable(case.plain(data) for _ in range(1 if case.steps else EPOCHS))
    for batch in itertools.islice(epochs, case.steps):
        optimizer.zero_grad()
        case.step(trained, batch).backward()
        optimizer.step()
        steps += 1
    return steps, {key: tensor.detach().clone() for key, tensor in trained.state_dict().items()}


def outcome(name: str, found: Any) -> str:
    """A cell's text: "equal", the sentence that refuses it, or a fault."""
    if isinstance(found, str):
        return found
    (expected_steps, expected), (steps, weights) = by_hand(name), found
    if steps != expected_steps:
        return f"DIFFERS: {steps} steps, not {expected_steps}"
    gaps = {key: (tensor - weights[key]).abs().max().item() for key, tensor in expected.items()}
    wrong = {key: gap for key, gap in gaps.items() if not gap <= 1e-9}
    return f"DIFFERS: {', '.join(f'{k} by {v:.1e}' for k, v in wrong.items())}" if wrong else "equal"


def row(pool: Any, name: str, meshes: Sequence[str]) -> dict[str, str]:
    """The cells of a form of data on some meshes, whose ranks `pool` starts."""
    return {mesh: outcome(name, found_by(on_ranks, pool, run_cell, name, mesh)) for mesh in meshes}
