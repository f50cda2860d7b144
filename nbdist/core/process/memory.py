"""Memory management outside of the training steps: the C allocator, garbage collection, memory after an error."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from nbdist.errors import TaskError

__all__ = [
    "PeakMemory",
    "bytes_within_limits",
    "check_fits",
    "free_frames",
    "free_unused_memory",
    "frozen_gc",
    "is_out_of_memory",
    "keep_freed_pages",
    "keep_large_pages",
    "memory_is_limited",
    "note_frozen",
]

# From malloc.h, see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_ANY_BYTES = 2**30
_SMALL_BYTES = 2**22
_STATUS = Path("/proc/self/status")  # Linux only
_FREE = Path("/proc/meminfo")
_RESET = Path("/proc/self/clear_refs")  # proc(5): a 5 resets the peak of the resident memory
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")
_AFTERWARDS = {_M_TRIM_THRESHOLD: 2**26, _M_MMAP_THRESHOLD: 2**25}  # the largest values that glibc sets by itself


@contextlib.contextmanager
def keep_freed_pages(return_large: bool = False) -> Iterator[None]:
    """Let malloc keep freed memory within the context; it is returned to the system at the end. Local.

    Every step frees its activations and gradients. By default glibc returns large blocks to the system at once, and the
    next step pays a page fault for each of their pages: a fifth of the time of a small convolutional network. Without
    glibc nothing changes.

    Args:
        return_large: Still return blocks above 4 MiB at once, because memory that is kept is fragmented; until
            `keep_large_pages`.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    largest = _SMALL_BYTES if return_large else _ANY_BYTES
    for parameter, value in {_M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_THRESHOLD: largest}.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _AFTERWARDS.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def memory_is_limited() -> bool:
    """Whether a limit on this process's memory holds (``ulimit -v`` or ``-d``). Local."""
    return bool(_limits())


def bytes_within_limits() -> int | None:
    """How much more memory this process may take (``ulimit -v`` and ``-d``); None if that is not limited. Local."""
    limits = _limits()
    if not limits or not _STATUS.exists():
        return None
    used = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return min(limit - int(used[name].split()[0]) * 1024 for name, limit in limits.items())


def check_fits(needed: int, what: str, cure: str) -> None:
    """Check that so many bytes of this host's memory are free, as far as that is known. Local.

    Raises:
        TaskError: They are not.
    """
    if not _FREE.exists():
        return
    free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _FREE.read_text().splitlines()}
    within = bytes_within_limits()
    available = free["MemAvailable"] if within is None else min(within, free["MemAvailable"])
    if needed > available:
        raise TaskError(
            f"{what} take {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} GiB are free: {cure}."
        )


def _limits() -> dict[str, int]:
    """The limits that hold, in bytes, by what counts towards them in `_STATUS`."""
    kinds = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
    found = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {name: limit for name, limit in found.items() if limit != resource.RLIM_INFINITY}


def keep_large_pages() -> None:
    """Within `keep_freed_pages`: return what is free, and keep blocks of any size from now on. Local.

    Setting up a sharded model and its first step free whole tensors, with parts between them that stay: kept, they
    would be fragments. Each later step allocates the same large tensors again, and they find their place.
    """
    if memory_is_limited():  # what is kept counts
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
        library.mallopt(_M_MMAP_THRESHOLD, _ANY_BYTES)


class PeakMemory:
    """The most memory that this process has had since: of a GPU what torch has allocated, else what is resident. Local.

    Where Linux does not let it begin anew, it is that since the process began.

    Args:
        device: Of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                _RESET.write_text("5")

    @property
    def nbytes(self) -> int:
        """How much, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if _STATUS.exists():
            found = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
            return int(found["VmHWM"].split()[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_unused_memory() -> None:
    """Return unused memory to the system: reference cycles, torch's CUDA cache, malloc's free blocks. Local."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def free_frames(error: BaseException) -> None:
    """After an out-of-memory error, free what the variables of its frames hold: a model, its gradients. Local.

    Otherwise the process could do nothing more, not even start a thread. The frames stay, without their variables.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(is_out_of_memory(link) for link in chain):
        for link in chain:
            traceback.clear_frames(link.__traceback__)
        free_unused_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on whichever device. Local."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


_frozen_before = False
"""Whether other code has called `gc.freeze` here. Cached, because Python counts frozen objects one by one: 12 ms."""
_runs = 0
"""How many runs are inside of `frozen_gc`: one may start within another."""


def note_frozen() -> None:
    """Say that other code has called `gc.freeze`, which forks of this process need not find out then. Local."""
    global _frozen_before
    _frozen_before = True


@contextlib.contextmanager
def frozen_gc() -> Iterator[None]:
    """Freeze all existing objects (`gc.freeze`), so that the garbage collector visits new ones only. Local.

    Torch alone makes some 200,000 permanent objects. A full collection that visits them in the middle of a step takes
    80 ms, and all ranks wait for it. An engine's objects were frozen before it was forked, and stay frozen.
    """
    global _frozen_before, _runs
    _frozen_before = _frozen_before or (_runs == 0 and gc.get_freeze_count() > 0)
    if _frozen_before:
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
