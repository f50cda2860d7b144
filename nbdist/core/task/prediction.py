"""The task of a prediction: a model, data, and a step that only calls the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils import data as torch_data

from nbdist.core.data.sources import Source
from nbdist.core.task.built_model import builds_model, built_model, lies_in_file
from nbdist.core.task.check_model import check_model
from nbdist.core.task.metrics import TARGET_KEYS
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

__all__ = ["ForwardStep", "prediction_task"]

_RANDOM = (torch_data.RandomSampler, torch_data.SubsetRandomSampler, torch_data.WeightedRandomSampler)


class ForwardStep:
    """The step of a prediction: ``model(*inputs)`` or ``model(**batch)``; a target in the batch is left out.

    The last element of a tuple or list is the target, unless the model's forward requires it. A dict is passed as
    keywords, without those names of a target that forward does not take.

    Args:
        model: The model; its signature says what it takes.
        name: The user's name of the data.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._name = name
        self._required, self._names = 1, None
        inner = getattr(model, "_orig_mod", model)  # of a compiled model
        try:
            parameters = list(inspect.signature(inner.forward).parameters.values())
        except (TypeError, ValueError):
            return
        single = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._required = sum(p.kind in single and p.default is p.empty for p in parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            self._names = {p.name for p in parameters if p.kind in (*single[1:], inspect.Parameter.KEYWORD_ONLY)}

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's output.

        Raises:
            TaskError: The model does not take a key of the batch.
        """
        if isinstance(batch, Mapping):
            return model(**self._keywords(batch))
        if isinstance(batch, (tuple, list)):
            return model(*(batch if len(batch) <= max(1, self._required) else batch[:-1]))
        return model(batch)

    def _keywords(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        names = self._names
        if names is None:
            return dict(batch)
        odd = [key for key in batch if key not in names and key not in TARGET_KEYS]
        if odd:
            raise TaskError(
                f"a batch of {self._name} has {odd[0]}, which the model's forward does not take ({', '.join(names)}): "
                "give data with the names that it takes."
            )
        return {key: value for key, value in batch.items() if key in names}


def prediction_task(
    model: Any, data: Any, *, batch_size: int | None = None, names: tuple[str, str] = ("model", "data")
) -> Task:  # fmt: skip
    """The task of a prediction. Local; nothing is changed.

    Args:
        model: An ``nn.Module``, or a callable that builds it; its parameters may be frozen.
        data: See `Source`.
        batch_size: Global batch size, if the user gave one.
        names: The user's names for `model` and `data`.

    Raises:
        TaskError: An argument cannot be used.
        PlanError: The batch size contradicts the data's own.
    """
    if built := builds_model(model):
        model = built_model(model, None, names[0])
    check_model(model, names[0], trained=False)
    source = Source.of(data, names[1])
    if isinstance(source.sampler, _RANDOM):
        raise TaskError(
            f"{names[1]} reads in the random order of {type(source.sampler).__name__}, which its outputs would have "
            f"too: give {names[1]}.dataset."
        )
    source.check_agrees(names[1], "batch_size", batch_size)
    return Task(
        model=model,
        data=replace(source, drop_last=False, shuffle=None),
        step=ForwardStep(model, names[1]),
        optimizers={},
        val=None,
        metric=None,
        own_optimizers=False,
        in_file=built or lies_in_file(model),
        options={"batch_size": batch_size or source.batch_size},
    )
