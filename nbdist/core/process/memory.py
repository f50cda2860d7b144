"""Keeping memory management out of the steps."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import traceback
from collections.abc import Iterator

import torch

__all__ = ["free_frames", "give_back", "objects_set_aside", "pages_kept"]

# From malloc.h, see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_ANY_BYTES = 2**30
_SMALL_BYTES = 2**22
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
_AFTERWARDS = {_M_TRIM_THRESHOLD: 2**26, _M_MMAP_THRESHOLD: 2**25}  # to which the C library moves them by itself


@contextlib.contextmanager
def pages_kept(sparing: bool = False) -> Iterator[None]:
    """Let the C library keep what is freed meanwhile, and give it back to the system in the end. Local.

    Every step frees its activations and gradients. By default glibc hands larger ones back at once, and the next step
    pays a page fault for each of their pages: a fifth of the time of a small convolutional network. Without glibc
    nothing changes.

    Args:
        sparing: Hand back what is larger than 4 MiB, where memory is scarcer than time: what is kept lies in pieces.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    largest = _SMALL_BYTES if sparing else _ANY_BYTES
    for parameter, value in {_M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_THRESHOLD: largest}.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _AFTERWARDS.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def give_back() -> None:
    """Give memory back that nobody uses: what lies in cycles, and what the C library and torch keep. Local."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def free_frames(error: BaseException) -> None:
    """If memory has run out, give back what the frames of the error hold: a model, its gradients. Local.

    Nothing more could be done here otherwise, not even a thread started. The frames stay, but without their variables.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(_is_out_of_memory(link) for link in chain):
        for link in chain:
            traceback.clear_frames(link.__traceback__)
        give_back()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


_aside_before = False
"""Whether somebody else has set objects aside here. Python counts them one by one: 12 ms in an engine, so only once."""
_runs = 0
"""For how many runs they are set aside by us: one may be begun within another."""


@contextlib.contextmanager
def objects_set_aside() -> Iterator[None]:
    """Let Python's garbage collector look at new objects only meanwhile. Local.

    Torch alone makes some 200,000 objects that stay; a full collection in the middle of a step takes 80 ms to find that
    out, and all ranks wait for it. An engine's were set aside before it was forked, and stay so.
    """
    global _aside_before, _runs
    _aside_before = _aside_before or (_runs == 0 and gc.get_freeze_count() > 0)
    if _aside_before:
        yield
        return
    if _runs == 0:
        gc.freeze()
    _runs += 1
    try:
        yield
    finally:
        _runs -= 1
        if _runs == 0:
            gc.unfreeze()
