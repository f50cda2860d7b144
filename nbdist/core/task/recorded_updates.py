"""The objects with `update` and `compute` that a user's ``evaluate(model, batch)`` uses, and their recorded updates."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdist.core.data.sample_rows import kept
from nbdist.core.params.program_state import is_of_library
from nbdist.core.sync.step_log import StepLog
from nbdist.core.task.metrics import accumulates, is_count
from nbdist.core.task.own_loop import outside_values
from nbdist.errors import TaskError

__all__ = ["Call", "add_numbers", "numbers_of", "recorded", "used_objects"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one `update`."""

_HOW = 'return a dict of numbers, or of objects with update and compute, as in {"f1": f1}'
_COMPUTES = (
    "{evaluate} calls compute of {name} on one slice of a batch, where the value over all data is meant: return the "
    'object itself, as in {{"{name}": {name}}}, and compute is called at the end.'
)
_UPDATES = (
    "{evaluate} updates {name}, but does not return it, so what it returns can only be of one slice: return the object "
    'itself, as in {{"{name}": {name}}}.'
)


def used_objects(evaluate: Any) -> dict[str, Any]:
    """The objects with `update` and `compute` that a function finds outside itself, by the names it has for them.

    Under global names, also those of the user's functions that it calls; in closures; as attributes of the user's
    objects there, and of the one whose method it is; in dicts, lists and tuples. In the same order in every process.
    Local.
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    queue: list[tuple[str, Any]] = [("", evaluate)]
    while queue:
        path, value = queue.pop(0)
        if id(value) in seen or isinstance(value, (type, types.ModuleType)):
            continue
        seen[id(value)] = value
        if accumulates(value) and hasattr(value, "__dict__"):
            name = path or type(value).__name__
            found[name if name not in found else f"{name} ({len(found)})"] = value
        else:
            queue += _inside(path, value)
    return found


def _inside(path: str, value: Any) -> list[tuple[str, Any]]:
    """What a value leads to, by paths."""
    if isinstance(value, functools.partial):
        return [(path, value.func), *_items(path, [*value.args, *value.keywords.values()])]
    if isinstance(value, types.MethodType):
        return [(path, value.__func__), (path, value.__self__)]
    if isinstance(value, types.FunctionType):
        named = sorted(outside_values(value), key=lambda pair: pair[0])
        if is_of_library(value.__code__):  # such as what @torch.no_grad() makes of the user's function
            named = [pair for pair in named if pair[0] in value.__code__.co_freevars]
        return named
    if type(value) in (list, tuple):
        return _items(path, value)
    if isinstance(value, dict):
        return [(f"{path}[{key!r}]", one) for key, one in value.items()]
    if not _is_users(type(value)):
        return []
    attributes = [*getattr(value, "_modules", {}).items(), *getattr(value, "__dict__", {}).items()]
    own = [(f"{path}.{name}" if path else name, one) for name, one in attributes if name != "_modules"]
    call = vars(type(value)).get("__call__")
    return [*own, *([(path, call)] if call is not None and not isinstance(value, nn.Module) else [])]


def _items(path: str, values: Any) -> list[tuple[str, Any]]:
    return [(f"{path}[{number}]", one) for number, one in enumerate(values)]


def _is_users(kind: type) -> bool:
    """Whether a class, or one that it derives from, has a method that is no library's."""
    methods = (one for base in kind.__mro__ for one in vars(base).values() if isinstance(one, types.FunctionType))
    return any(not is_of_library(method.__code__) for method in methods)


@contextlib.contextmanager
def recorded(objects: Mapping[str, Any], evaluate: str) -> Iterator[dict[str, list[Call]]]:
    """Context in which the updates of objects are recorded, by name, and not carried out. Local.

    So objects need not be on the device of the data, and what an update costs is not paid twice. A call of a metric of
    torchmetrics, which updates and returns the value of the batch, is recorded too, and returns None.

    Args:
        objects: By name.
        evaluate: The name of the function.
    """
    calls: dict[str, list[Call]] = {}

    def record(name: str, *args: Any, **kwargs: Any) -> None:
        calls.setdefault(name, []).append(kept((args, kwargs)))

    def refuse(name: str, *_: Any, **__: Any) -> None:
        raise TaskError(_COMPUTES.format(evaluate=evaluate, name=name))

    def leave(*_: Any, **__: Any) -> None:
        """In place of `reset`: there is nothing to forget."""

    with contextlib.ExitStack() as cleanup:
        for name, one in objects.items():
            for method, instead in (("update", record), ("forward", record), ("compute", refuse), ("reset", leave)):
                if callable(getattr(one, method, None)):
                    cleanup.enter_context(_attribute(one, method, functools.partial(instead, name)))
        yield calls


@contextlib.contextmanager
def _attribute(one: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which an object has an attribute of its own, without what its class does when one is set."""
    before = {name: vars(one)[name]} if name in vars(one) else {}
    vars(one)[name] = value
    try:
        yield
    finally:
        del vars(one)[name]
        vars(one).update(before)


def numbers_of(
    returned: Any, objects: Mapping[str, Any], calls: Mapping[str, list[Call]], evaluate: str
) -> tuple[dict[Any, tuple[Any, Any]], dict[str, str]]:
    """What a call has returned: numbers with their weights (None for that of samples), and names of `objects`.

    Raises:
        TaskError: It returned something else, or not an object that it has updated.
    """
    if not isinstance(returned, Mapping):
        raise TaskError(f"{evaluate} returned a value of type {type(returned).__name__}: {_HOW}.")
    numbers: dict[Any, tuple[Any, Any]] = {}
    named: dict[str, str] = {}
    for key, value in returned.items():
        if accumulates(value):
            name = next((name for name, one in objects.items() if one is value), None)
            if name is None:
                raise TaskError(
                    f"{evaluate} returned {key}, an object that it does not find under a name of the notebook: make it "
                    "there, so that it is known before the evaluation begins."
                )
            named[str(key)] = name
        elif type(value) is tuple:
            if len(value) != 2 or not _is_number(value[1]) or not is_count(value[1], sure=True):
                raise TaskError(
                    f"{evaluate} returned a tuple for {key}, which is (mean, weight), with the number that the mean is "
                    "over: return several values under names of their own."
                )
            numbers[key] = value
        else:
            numbers[key] = value, None
    left = [name for name in calls if name not in named.values()]
    if left:
        raise TaskError(_UPDATES.format(evaluate=evaluate, name=left[0]))
    return numbers, named


def add_numbers(
    log: StepLog, numbers: Mapping[Any, tuple[Any, Any]], index: int, samples: int, evaluate: str
) -> dict[Any, Any]:
    """Add the numbers of one slice to a log; returns their weights. Local.

    Args:
        log: The log.
        numbers: See `numbers_of`.
        index: Of the slice.
        samples: In it: the weight of numbers without one, and of an empty slice's.
        evaluate: The name of the function.
    """
    weights = {}
    for key, (value, weight) in numbers.items():
        weights[key] = samples if weight is None or not samples else weight
        log.add({key: value}, index, weights[key], of=evaluate, reserved=())
    return weights


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
