"""Process settings during training: torch's threads, deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["deterministic", "threads"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads within the context. Local."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms within the context; torch raises on an operation that has none. Local."""
    switches: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills, tries = switches.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")  # torch requires it for deterministic cuBLAS
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # it costs a pass over memory, for values that are never read
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        switches.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = tries
        if workspace is None:
            del os.environ[_CUBLAS]
