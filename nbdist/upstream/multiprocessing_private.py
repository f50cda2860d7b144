"""What nbdist uses of `multiprocessing` and torch's loading processes that they do not document.

`tests/upstream/test_multiprocessing_private.py` shows that it does what it should. Verified: CPython 3.11, torch 2.13.
"""

from __future__ import annotations

import functools
import sys
import types
from multiprocessing import queues, reduction
from typing import Any

import cloudpickle
from torch._utils import ExceptionWrapper

__all__ = ["by_value", "send_anything"]


def send_anything() -> None:
    """Let this process, a worker of a DataLoader, send whatever it has loaded; what it cannot send raises in its rank.

    Classes and functions that no module has (those of a notebook, on an engine) are sent by value. Without this the
    queue prints an error and drops the batch, and the rank waits for it for ever.
    """
    reduction.ForkingPickler.reducer_override = _by_value  # type: ignore[method-assign]
    queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _by_value(_pickler: Any, value: Any) -> Any:
    """See `pickle.Pickler.reducer_override`."""
    return by_value(value)


def by_value(value: Any) -> Any:
    """How a class or function that no module has is reduced, for `pickle.Pickler.reducer_override`: by value.

    The receiver makes it once, however often it is sent.
    """
    if not isinstance(value, (type, types.FunctionType)) or _is_importable(value):
        return NotImplemented
    return _loaded, (_dumped(value),)


def _is_importable(value: Any) -> bool:
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


@functools.lru_cache(maxsize=64)
def _dumped(value: Any) -> bytes:
    pickled: bytes = cloudpickle.dumps(value)
    return pickled


@functools.lru_cache(maxsize=64)
def _loaded(pickled: bytes) -> Any:
    """The same object each time: batches are of one class."""
    return cloudpickle.loads(pickled)


def _send_error(queue: Any, error: Exception, item: Any) -> None:
    """See `multiprocessing.queues.Queue`: called where an item cannot be pickled. Torch's items begin with a number."""
    failed = TypeError(f"a loading process cannot send its batch: {error}. Return tensors, or use num_workers=0.")
    queue.put((item[0], ExceptionWrapper((TypeError, failed, error.__traceback__), where="in a loading process")))
