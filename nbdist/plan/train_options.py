"""All options of a training: those of its plan, and what is trained beside model and data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from nbdist.plan.option import Option
from nbdist.plan.plan import OPTIONS

if TYPE_CHECKING:
    from typing_extensions import Unpack
elif sys.version_info >= (3, 11):
    from typing import Unpack
else:  # so the type hints of what takes it can be evaluated
    Unpack = Any

__all__ = ["TRAIN_OPTIONS", "TrainOptions", "Unpack"]

TRAIN_OPTIONS: dict[str, Option] = {
    "val": Option(
        help="Validation data, in the same forms as the training data.", metavar="DATA", read="value", of_task=True
    ),
    **OPTIONS,
    "step": Option(
        help="In place of `loss`: step(model, batch), which returns a mean; or (mean, weight), (mean, log), or "
        "(mean, weight, log). "
        "One that calls nbdist.update(loss, optimizer) for each of several losses returns nothing, or the log.",
        read="value",
        of_task=True,
    ),
    "weights": Option(
        help="A safetensors file, or a folder of them, that is loaded into a MODEL which a callable builds.",
        metavar="PATH",
        read="path",
        of_task=True,
    ),
}
"""By name, in the order of help texts."""


class TrainOptions(TypedDict, total=False):
    """The types of `TRAIN_OPTIONS`, for type checkers. None is as good as not given."""

    val: Any
    strategy: str | None
    loss: Any
    reduction: str | None
    optimizer: Any
    lr: float | None
    lr_scheduler: Callable[[Any], Any] | None
    schedule_by: str | None
    epochs: int | None
    steps: int | None
    batch_size: int | None
    accumulate: int | None
    clip_norm: float | None
    precision: str | None
    sync_batchnorm: bool | None
    microbatches: int | None
    schedule: str | None
    split_at: Sequence[str] | None
    tensor_plan: Mapping[str, str] | None
    metric: Any
    evaluate: Callable[[Any, Any], Any] | None
    after_step: Callable[[Any], Any] | None
    ema: float | None
    each_epoch: Callable[[Any, Any], Any] | None
    keep_best: str | None
    shuffle: bool | None
    seed: int | None
    reproducible: int | bool | None
    threads: int | None
    bucket_mib: float | None
    gather: bool | None
    checkpoint: str | None
    checkpoint_every: int | str | None
    checkpoint_frozen: bool | None
    checkpoint_keep: int | None
    resume: str | bool | None
    early_stop: str | None
    stop_on_nan: bool | None
    check: str | None
    rehearse: bool | None
    tensorboard: str | None
    step: Callable[[Any, Any], Any] | None
    weights: str | None
