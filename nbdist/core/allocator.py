"""Keeping memory management out of the steps."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

__all__ = ["objects_set_aside", "pages_kept"]

# From malloc.h, see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_WHILE_TRAINING = {_M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_THRESHOLD: 2**30}
_AFTERWARDS = {_M_TRIM_THRESHOLD: 2**26, _M_MMAP_THRESHOLD: 2**25}  # to which the C library moves them by itself


@contextlib.contextmanager
def pages_kept() -> Iterator[None]:
    """Let the C library keep what is freed meanwhile, and give it back to the system in the end. Local.

    Every step frees its activations and gradients. By default glibc hands larger ones back at once, and the next step
    pays a page fault for each of their pages: a fifth of the time of a small convolutional network. Without glibc
    nothing changes.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    for parameter, value in _WHILE_TRAINING.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _AFTERWARDS.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


@contextlib.contextmanager
def objects_set_aside() -> Iterator[None]:
    """Let Python's garbage collector look at new objects only meanwhile. Local.

    Torch alone makes some 200,000 objects that stay; a full collection in the middle of a step takes 80 ms to find that
    out, and all ranks wait for it. An engine's were set aside before it was forked, and stay so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
