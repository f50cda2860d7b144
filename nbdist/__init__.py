"""nbdist: train one PyTorch model on several processes, without leaving the notebook."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbdist.cluster import Cluster, Run, current_cluster, last_run
    from nbdist.core.api import predict, train
    from nbdist.core.params.unshard import unshard
    from nbdist.core.result import Result
    from nbdist.core.state.checkpoint_writer import load_checkpoint
    from nbdist.core.sync.batch_gather import current_step, gather, rank, world_size
    from nbdist.core.task.carried_state import carried
    from nbdist.core.task.step_updates import update
    from nbdist.plan import Mesh, Plan
    from nbdist.telemetry import compare, past_runs

    __version__: str

__all__ = [
    "Cluster",
    "Mesh",
    "Plan",
    "Result",
    "Run",
    "carried",
    "compare",
    "current_cluster",
    "current_step",
    "gather",
    "last_run",
    "load_checkpoint",
    "past_runs",
    "predict",
    "rank",
    "train",
    "unshard",
    "update",
    "world_size",
]

# Imported on first use: `%load_ext nbdist` must not import torch, a script under torchrun must not import IPython.
_MODULES = {
    "Cluster": "nbdist.cluster",
    "Mesh": "nbdist.plan",
    "Plan": "nbdist.plan",
    "Result": "nbdist.core",
    "Run": "nbdist.cluster",
    "carried": "nbdist.core",
    "compare": "nbdist.telemetry",
    "current_cluster": "nbdist.cluster",
    "current_step": "nbdist.core",
    "gather": "nbdist.core",
    "last_run": "nbdist.cluster",
    "load_checkpoint": "nbdist.core",
    "past_runs": "nbdist.telemetry",
    "predict": "nbdist.core",
    "rank": "nbdist.core",
    "train": "nbdist.core",
    "unshard": "nbdist.core",
    "update": "nbdist.core",
    "world_size": "nbdist.core",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # the store's server imports nbdist too, and reading the metadata takes 20 ms
        return _version()
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'nbdist' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nbdist")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def load_ipython_extension(shell: Any) -> None:
    """Register the magics: ``%load_ext nbdist``."""
    from nbdist.notebook import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Stop the engines, if any."""
    from nbdist.notebook import unload

    unload(shell)
