"""Cells of the table of trainings: a kind of training on a mesh beside the same in plain PyTorch."""

from __future__ import annotations

import functools
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

from cells import MESHES, found_by, on_ranks, ranks_of
from trainings import CASES, in_notebook

from nbdist.core.comm.world import World

__all__ = ["CASES", "MESHES", "outcome", "row"]


def run_cell(world: World, name: str, mesh: str) -> dict[str, Any]:
    """What is found on a mesh. On one rank."""
    warnings.simplefilter("ignore")
    run = CASES[name].run
    assert run is not None
    return run(world, mesh)


@functools.cache
def _by_hand(name: str) -> dict[str, Any]:
    with torch.random.fork_rng():
        return CASES[name].by_hand()


def outcome(name: str, found: Any) -> str:
    """A cell's text: "equal", the sentence that refuses it, or a fault: what differs, or which error came."""
    if isinstance(found, str):
        return found
    wrong = []
    for key, value in _by_hand(name).items():
        expected, seen = (_stacked(each) for each in (value, found[key]))
        if expected.shape != seen.shape:
            wrong.append(f"{key} is {tuple(seen.shape)}, not {tuple(expected.shape)}")
        elif not (gap := (expected - seen).abs().max().item()) <= 1e-9:
            wrong.append(f"{key} by {gap:.1e}")
    return f"DIFFERS: {', '.join(wrong)}" if wrong else "equal"


def _stacked(value: Any) -> torch.Tensor:
    tensors = isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
    return torch.as_tensor(torch.stack(value) if tensors else value, dtype=torch.float64)


def row(pool: Any, name: str, meshes: Sequence[str]) -> dict[str, str]:
    """The cells of a kind of training on some meshes, whose ranks `pool` starts."""
    cells = CASES[name].cells
    found = (
        found_by(in_notebook, cells, ranks_of(mesh), mesh) if cells else found_by(on_ranks, pool, run_cell, name, mesh)
        for mesh in meshes
    )
    return {mesh: outcome(name, each) for mesh, each in zip(meshes, found, strict=True)}
