"""Errors of a step that only a mesh has: in one sentence, with the strategy on which it works."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nbdist.core.process.memory import is_out_of_memory
from nbdist.errors import NbdistError, PlanError
from nbdist.plan import Mesh

__all__ = ["explained"]


@contextlib.contextmanager
def explained(mesh: Mesh, runs_alone: bool) -> Iterator[None]:
    """Context in which a mesh is applied and tried, before the first update. Local.

    Args:
        mesh: The mesh.
        runs_alone: Whether the same step has just run in one process.

    Raises:
        PlanError: Something raised an error of another kind, which one process did not.
    """
    try:
        yield
    except (NbdistError, torch.distributed.DistError, OSError):
        raise
    except Exception as error:
        if not runs_alone or mesh.size == mesh.dp or is_out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        raise PlanError(
            f"the step runs in one process, but on mesh {mesh} it raises {what}: use the strategy data, which runs it "
            "as one process does."
        ) from error
