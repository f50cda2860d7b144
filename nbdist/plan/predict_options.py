"""The options of a prediction: those of a training's that say how the model's forward is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

from nbdist.plan.option import Option
from nbdist.plan.plan import OPTIONS

__all__ = ["PREDICT_OPTIONS", "PredictOptions"]

_HELP = {
    "batch_size": "Samples in one forward, over all ranks; a DataLoader has its own.",
    "precision": "Forward under autocast to bf16 or fp16; weights stay as they are.",
}

PREDICT_OPTIONS: dict[str, Option] = {
    name: replace(OPTIONS[name], help=_HELP.get(name, OPTIONS[name].help))
    for name in ("batch_size", "strategy", "precision", "split_at", "tensor_plan", "threads")
}
"""By name, in the order of help texts."""


class PredictOptions(TypedDict, total=False):
    """The types of `PREDICT_OPTIONS`, for type checkers. None is as good as not given."""

    batch_size: int | None
    strategy: str | None
    precision: str | None
    split_at: Sequence[str] | None
    tensor_plan: Mapping[str, str] | None
    threads: int | None
