"""Objects of one process: locks and thread-locals, made anew in another; threads, files and the like, refused.

Under torchrun every process makes its own lock. So one that nobody holds is sent as a new one, and with it everything
that is made of locks: conditions, events, queues, the lock of a `functools.cached_property`.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import io
import multiprocessing.process
import socket
import subprocess
import threading
import types
from typing import Any

import torch

from nbdist.core.transfer.refusal import Refusal

__all__ = ["LOCAL", "LOCKS", "refused_as", "sent_local", "sent_lock"]

LOCKS: tuple[type, type] = (type(threading.Lock()), type(threading.RLock()))
LOCAL: type = threading.local

_REFUSED: tuple[tuple[type, str], ...] = (
    (io.IOBase, "an open file"),
    (socket.socket, "a socket"),
    (threading.Thread, "a thread"),
    (concurrent.futures.Executor, "a pool of threads or processes"),
    (multiprocessing.process.BaseProcess, "a process"),
    (subprocess.Popen, "a process"),
    (types.GeneratorType, "a generator"),
    (types.CoroutineType, "a coroutine"),
    (types.AsyncGeneratorType, "a generator"),
    (types.FrameType, "a frame of running code"),
    (types.TracebackType, "a traceback"),
    (contextvars.ContextVar, "a context variable"),
    (torch.jit.ScriptModule, "a module of TorchScript"),
    (torch.jit.ScriptFunction, "a function of TorchScript"),
)
_ALLOWED = (io.BytesIO, io.StringIO)


def refused_as(kind: type) -> str:
    """What objects of a class are, if they cannot be sent to another process; else empty. Local."""
    if issubclass(kind, _ALLOWED):
        return ""
    return next((words for refused, words in _REFUSED if issubclass(kind, refused)), "")


def sent_lock(held: Any) -> tuple[Any, ...]:
    """Reduce a lock to a new one.

    Raises:
        Refusal: It is held, so that what it guards is half changed.
    """
    if not held.acquire(blocking=False):
        raise Refusal(held, "a lock that is held", "release it before")
    held.release()
    return (threading.Lock if type(held) is LOCKS[0] else threading.RLock), ()


def sent_local(value: Any) -> tuple[Any, ...]:
    """Reduce a `threading.local` to one with what this thread has in it."""
    return type(value).__new__, (type(value),), vars(value) or None, None, None, _update


def _update(value: Any, state: dict[str, Any]) -> None:
    vars(value).update(state)
