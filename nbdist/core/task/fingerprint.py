"""The fingerprint of a run: its plan, its model and data, and their values, to compare those of two processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nbdist.core.data.feed import digest
from nbdist.core.data.sources import Source
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["fingerprint", "state_of", "write_fingerprint"]

_SAMPLES = 8


def fingerprint(
    model: Any, data: Any, options: Mapping[str, Any], *, ranks: int, cores: int, weights: Any = None
) -> dict[str, Any]:
    """What `nbdist.train` would train, as JSON-able data. Local; nothing is changed.

    Args:
        model: Its argument.
        data: Its argument.
        options: Its options.
        ranks: How many ranks.
        cores: CPU cores of all ranks together.
        weights: A state_dict in place of the model's, or one of each of several modules.

    Returns:
        The ``plan``; the ``model``: name, shape and dtype of each tensor, what is trained, kind and mode of each
        module; and digests of its ``weights``, of the ``data`` and of ``val``; None of data that can be read only once.
    """
    task, plan_options = Task.of_options(model, data, options)
    plan = Plan.create(ranks=ranks, cores=cores, **plan_options)
    parameters = dict(task.model.named_parameters())
    tensors = {name: [list(t.shape), str(t.dtype)] for name, t in task.model.state_dict().items()}
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    modules = [(type(module).__name__, module.training) for module in task.model.modules()]
    return {
        "plan": json.loads(json.dumps(plan.to_dict())),
        "model": {"tensors": tensors, "trained": trained, "modules": json.loads(json.dumps(modules))},
        "weights": digest(state_of(task.given) if weights is None else weights).hex(),
        "data": _digest_of(task.data),
        "val": None if task.val is None else _digest_of(task.val),
    }


def write_fingerprint(path: str, *arguments: Any, **options: Any) -> None:
    """Write a `fingerprint` into a file. Local."""
    Path(path).write_text(json.dumps(fingerprint(*arguments, **options)))


def state_of(given: Any) -> Any:
    """The state_dict of a module; of several, a dict or list of them."""
    if isinstance(given, nn.Module):
        return dict(given.state_dict())
    if isinstance(given, Mapping):
        return {key: dict(module.state_dict()) for key, module in given.items()}
    return [dict(module.state_dict()) for module in given]


def _digest_of(source: Source) -> str | None:
    """The digest of all tensors in memory; of others the number of samples, and the first of them."""
    if source.tensors is not None:
        return digest([source.tensors, source.indices]).hex()
    first = source.first(min(_SAMPLES, source.samples or _SAMPLES))
    return None if first is None else digest([source.samples, first]).hex()
