"""Metrics: by name, as a callable, or as an object with `update` and `compute`; what they are given, and their errors.

A metric that is a mean over something is averaged over the slices, exactly, by the number that each mean is over. Any
other (F1, AUROC, a corpus score) has to see the whole validation set at once, or batch by batch in one object.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.nn import functional as F

from nbdist.errors import NbdistError, TaskError, suggest
from nbdist.upstream.torch_private import GroupHidden

__all__ = [
    "FINISHES", "METRICS", "TARGET_KEYS", "Evaluate", "Metric", "accumulates", "called_name", "check_evaluate",
    "find_metric", "is_count", "metric_name", "named_errors", "output_of", "perplexity", "target_of", "updates_by_pair",
]  # fmt: skip

Metric = Callable[[Any, Any], Any]
"""``metric(output, target)``: ``(mean, weight)`` of a slice, or any values of the whole set. Or an object."""

Evaluate = Callable[[Any, Any], Any]
"""``evaluate(model, batch)``: a dict of numbers, ``(mean, weight)`` pairs, or objects with `update` and `compute`."""

TARGET_KEYS = ("labels", "label", "target", "targets", "y")
"""Where the target is in a batch that is a dict, or an object with attributes."""

IGNORED = -100
"""The class number of targets that do not count."""


def accuracy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of targets that the output predicts.

    Args:
        output: Scores ``(batch, classes, ...)`` or ``(batch, ..., classes)``; or one logit per target, ``(batch, ...)``
            or ``(batch, ..., 1)``.
        target: Class numbers ``(batch, ...)``, -100 for ignored ones; or 0 and 1 for logits.
    """
    if output.ndim == target.ndim + 1 and output.shape != (*target.shape, 1):
        classes_last = output.shape[:-1] == target.shape
        hits = output.argmax(-1 if classes_last else 1) == target
    else:
        hits = (_as_target(output, target, "accuracy") > 0) == (target > 0.5)
    counted = target != IGNORED
    total = counted.sum()
    return (hits & counted).sum().double() / total.clamp(min=1), total


def perplexity(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood of the targets; of all slices together, its exponential is the perplexity.

    Args:
        output: Logits ``(batch, ..., classes)`` or ``(batch, classes, ...)``.
        target: Class numbers ``(batch, ...)``, -100 for ignored ones.
    """
    if output.ndim != target.ndim + 1:
        raise TaskError(
            f"metric perplexity needs logits of one more dimension than the targets, but they are of shapes "
            f"{tuple(output.shape)} and {tuple(target.shape)}: give a callable metric(output, target)."
        )
    scores = output if output.shape[:-1] == target.shape else output.movedim(1, -1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    total = F.cross_entropy(wide.flatten(0, -2), target.flatten().long(), ignore_index=IGNORED, reduction="sum")
    count = (target != IGNORED).sum()
    return total.double() / count.clamp(min=1), count


def _mae(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (_as_target(output, target, "mae") - target).abs().mean(), target.numel()


def _mse(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (_as_target(output, target, "mse") - target).square().mean(), target.numel()


def _as_target(output: torch.Tensor, target: torch.Tensor, metric: str) -> torch.Tensor:
    """The output in the shape of its target; broadcast, each would be compared with every other one."""
    if output.shape != target.shape:
        if [n for n in output.shape if n != 1] != [n for n in target.shape if n != 1]:
            raise TaskError(
                f"metric {metric} compares an output of shape {tuple(output.shape)} with a target of shape "
                f"{tuple(target.shape)}: give a callable metric(output, target)."
            )
        return output.reshape(target.shape)
    return output


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mae": _mae, "mse": _mse, "perplexity": perplexity}
"""Metrics by the names that ``--metric`` takes."""

FINISHES: dict[Metric, Callable[[float], float]] = {
    perplexity: lambda mean: math.exp(mean) if mean < math.log(1e308) else math.inf
}
"""What turns the mean of all slices into the metric, where it is not the mean itself."""


def find_metric(metric: Any) -> Metric:
    """Check a name, a callable, or an object with `update` and `compute`.

    Raises:
        TaskError: The name is unknown, or the value is none of them.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise TaskError(
                f"unknown metric {metric!r}: use {', '.join(METRICS)}, or a callable.{suggest(metric, METRICS)}"
            )
        return METRICS[metric]
    if isinstance(metric, type):
        raise TaskError(f"metric {metric.__name__} is a class, not a metric: write {metric.__name__}().")
    if not (callable(metric) or accumulates(metric)):
        if callable(getattr(metric, "compute", None)):
            raise TaskError(
                f"metric {type(metric).__name__} has compute, but no update: give a callable metric(output, target) "
                "that calls compute, and returns a number or a dict of them."
            )
        raise TaskError(f"metric must be a name or a callable, or have update and compute, not {metric!r}.")
    return cast(Metric, metric)


def check_evaluate(evaluate: Any, val: Any, metric: Any) -> str:
    """Check a user's `Evaluate`; returns its name. Local.

    Raises:
        TaskError: It cannot be called, there is no validation data, or a metric is given too.
    """
    name = called_name("evaluate(model, batch)", evaluate)
    if val is None:
        raise TaskError(f"evaluate={name} has no data to be called with: give val=... too.")
    if metric is not None:
        raise TaskError(f"give metric or evaluate, not both: {name} may return the metric in its dict.")
    return name


def called_name(form: str, function: Any) -> str:
    """The name of a function that the user gives for an option; empty if there is none. Local.

    Args:
        form: How it is called: the option's name and its arguments.
        function: What was given.

    Raises:
        TaskError: It cannot be called.
    """
    if function is None:
        return ""
    option = form.partition("(")[0]
    if isinstance(function, type) or not callable(function):
        raise TaskError(f"{option} must be a callable {form}, not {function!r}.")
    name = metric_name(function, option)
    try:
        inspect.signature(function).bind(*[None] * (form.count(",") + 1))
    except TypeError as error:
        raise TaskError(f"{option}={name} is called as {form}, and takes other arguments ({error}).") from None
    except ValueError:  # a builtin without a signature
        pass
    return name


def metric_name(metric: Any, nameless: str = "metric") -> str:
    """The name of a metric in the plan and the history; a lambda's is `nameless`."""
    if isinstance(metric, str):
        return metric
    if isinstance(metric, functools.partial):
        return metric_name(metric.func, nameless)
    name = getattr(metric, "__name__", None) or type(metric).__name__
    return nameless if name == "<lambda>" else name


def accumulates(metric: Any) -> bool:
    """Whether a metric is an object with `update` and `compute`, which is given batches one by one."""
    return callable(getattr(metric, "update", None)) and callable(getattr(metric, "compute", None))


def updates_by_pair(metric: Any) -> bool:
    """Whether `update` takes one argument, ``(output, target)``, instead of two."""
    try:
        signature = inspect.signature(metric.update)
    except (TypeError, ValueError):
        return False
    for arguments in ((None, None), (None,)):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return len(arguments) == 1
    return False


def is_count(weight: Any, *, sure: bool) -> bool:
    """Whether a number can be that of what a mean is over: an integer, or a whole float. Local.

    Args:
        weight: The number.
        sure: Whether it is one, if a float of 0 or 1 can be: else (precision, recall) of a perfect model would do.
    """
    dtype = getattr(weight, "dtype", None)
    if isinstance(weight, int) or (dtype is not None and "float" not in str(dtype)):
        return float(weight) >= 0
    return float(weight).is_integer() and float(weight) >= (0 if sure else 2)


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Context in which the metric runs: an error names it, and it sees one process, which has all that it is given.

    Raises:
        TaskError: The metric raised an exception; with its own frames.
    """
    try:
        with GroupHidden():
            yield
    except NbdistError:
        raise
    except Exception as error:
        text = f"metric {name} raised {type(error).__name__}: {error}"
        raise TaskError(text).with_traceback(error.__traceback__) from error


def target_of(batch: Any, name: str) -> Any:
    """The target in a batch: the last element of a tuple or list; in a dict or an object, one of `TARGET_KEYS`.

    Raises:
        TaskError: There is none, or there are several.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[-1]
    keyed = isinstance(batch, Mapping)
    found = [
        key for key in TARGET_KEYS if (key in batch if keyed else getattr(batch, key, None) is not None)
    ]  # fmt: skip
    if len(found) == 1 and not isinstance(batch, torch.Tensor):
        return batch[found[0]] if keyed else getattr(batch, found[0])
    kind = f"a dict with the keys {', '.join(map(str, batch))}" if keyed else "a single value"
    if len(found) > 1:
        raise TaskError(
            f"metric {name} has one target, but a batch has several, {', '.join(found)}: leave one of those names."
        )
    raise TaskError(
        f"metric {name} takes the last element of a batch (x, y) as target, or in a dict one of the keys "
        f"{', '.join(TARGET_KEYS)}, but a batch here is {kind}: give such data."
    )


def output_of(output: Any, metric: Any, name: str) -> Any:
    """What a metric is given of a model's output: its `logits`, if it has any, else all of it.

    Raises:
        TaskError: A metric known by its name needs one tensor, and the output is none.
    """
    known = any(metric is one for one in METRICS.values())
    if not isinstance(output, torch.Tensor):
        logits = getattr(output, "logits", None)
        if logits is None and known and isinstance(output, Mapping):
            logits = output.get("logits")
        output = output if logits is None else logits
    if known and not isinstance(output, torch.Tensor):
        kind = f"a dict with the keys {', '.join(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise TaskError(
            f"metric {name} needs a tensor, but the model returned a {kind.removeprefix('a ')}: give a callable "
            "metric(output, target) that takes what it needs of it."
        )
    return output
