"""What holds in a process while it trains: its threads, determinism, and that it may not be interrupted now."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["deterministic", "threads", "uninterrupted"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads meanwhile. Local."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch compute the same bits from the same numbers meanwhile, or say which operation cannot. Local."""
    switches: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, tries = switches.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")  # torch asks for it before it lets cuBLAS compute
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # nobody reads it, and it costs a pass over memory
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        switches.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tries
        if workspace is None:
            del os.environ[_CUBLAS]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no interrupt land meanwhile; one that comes is dropped. Local."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
