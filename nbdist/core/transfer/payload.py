"""Payloads: objects pickled for other processes, their tensors and arrays in one shared-memory segment.

Tensors that lie in a file (`file_memory.py`) stay there.

On one host the *segment* is anonymous shared memory, which every process maps privately (copy-on-write): receivers do
not copy, a write is visible to the writer only, and the memory is freed when the last process closes or unmaps it, even
by being killed. To another host the segment's bytes are sent, into a segment there.
"""

from __future__ import annotations

import bisect
import functools
import gc
import itertools
import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nbdist.core.transfer import pickler
from nbdist.core.transfer.refusal import Refusal
from nbdist.errors import TaskError
from nbdist.segment_path import open_segment, segment_path

__all__ = ["Holder", "Payload", "Segment", "SegmentCache", "is_released", "pack", "unpack"]

_ALIGNMENT = 64
_OWN_MAPPING_BYTES = 1 << 20  # a larger storage gets its own mapping, which is unmapped when the storage is freed
_THREADED_COPY_BYTES = 1 << 20
_MAX_CACHED_BYTES = 1 << 28  # a larger segment is not cached: its memory is worth more than the time to make a new one

_numbers = itertools.count()
_mapped: dict[str, weakref.WeakSet[mmap.mmap]] = {}
"""The mappings of unpacked segments that objects in this process still use, by path."""


class Holder(Protocol):
    """A process (the anchor) that creates shared memory and keeps it open, so that it outlives its user."""

    def hold(self) -> str:
        """Create shared memory; returns its path."""

    def release(self, path: str) -> None:
        """Close the memory with this path."""

    def release_later(self, path: str) -> None:
        """`release` without waiting for a reply: garbage collection may call it while this thread waits for one."""


class Segment:
    """Shared memory that the creating process keeps open; others map it by `path`.

    Args:
        size: Bytes.
        holder: Keeps the memory open too, until `close`; None for this process alone.
        path: An existing segment's, created by an earlier process and kept by the holder; by default a new one is made.
    """

    def __init__(self, size: int, holder: Holder | None = None, path: str = "") -> None:
        self.number = next(_numbers)  # unlike a path, never reused for another segment
        self._holder = holder
        self._file = -1
        self._filled = bool(path)
        self._name: str | None = None
        self._owner = os.getpid()
        if path:
            self.path = path
            self._file = open_segment(path)
            self.size = os.fstat(self._file).st_size
            return
        self.size = max(size, 1)
        if holder is not None:
            self.path = holder.hold()
            self._file = open_segment(self.path)
        elif hasattr(os, "memfd_create"):
            self._file = os.memfd_create("nbdist", os.MFD_CLOEXEC)
            self.path = segment_path(self._file, f"/proc/{os.getpid()}/fd/{self._file}")
        else:
            self._file, self._name = tempfile.mkstemp(prefix="nbdist-")
            self.path = segment_path(self._file, self._name)
        os.ftruncate(self._file, self.size)

    @functools.cached_property
    def buffer(self) -> mmap.mmap:
        """The segment, mapped as shared memory."""
        return mmap.mmap(self._file, self.size)

    @property
    def descriptor(self) -> int:
        """The open file descriptor, to be sent over a socket."""
        return self._file

    def fill(self, regions: list[tuple[int, memoryview]]) -> None:
        """Write bytes at their offsets: first with pwrite, which saves a page fault per new page, later with a copy."""
        for start, content in regions:
            if self._filled and len(content) >= _THREADED_COPY_BYTES and not content.readonly:
                source = torch.frombuffer(content, dtype=torch.uint8)  # torch copies with all its threads
                torch.frombuffer(self.buffer, dtype=torch.uint8, count=len(content), offset=start).copy_(source)
                continue
            done = 0
            while done < len(content):
                done += os.pwrite(self._file, content[done:], start + done)
        self._filled = True

    def empty(self) -> None:
        """Free the memory but keep the (now empty) file. No process may be using it."""
        os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Close the segment; processes that have mapped it keep their mappings. Twice is fine."""
        if self._closed() and self._holder is not None:
            self._holder.release(self.path)

    def _closed(self) -> bool:
        """Close the file here; returns whether it was open and this process owns the segment."""
        if self._file < 0:
            return False
        os.close(self._file)
        self._file = -1
        if self._owner != os.getpid():
            return False  # a forked child closes its copy of the descriptor only
        if self._name:
            os.unlink(self._name)
        return True

    def __del__(self) -> None:
        # `os` is None while the interpreter ends; then the system closes the segment.
        if os is not None and self._closed() and self._holder is not None:
            self._holder.release_later(self.path)


class SegmentCache:
    """Makes segments, and caches one for reuse, because its pages are already allocated.

    A segment may be overwritten only when no process maps it: a page of a private mapping shows others' writes until
    its own process writes to it.

    Args:
        holder: See `Segment`.
    """

    def __init__(self, holder: Holder | None = None) -> None:
        self._holder = holder
        self._cached: Segment | None = None
        self._is_free: Callable[[], bool] = lambda: False

    def segment(self, size: int) -> Segment:
        """A segment of at least `size` bytes."""
        cached, self._cached = self._cached, None
        if cached is not None and size <= cached.size and self._is_free():
            return cached
        if cached is not None:
            cached.close()
        return Segment(size, self._holder)

    def recycle(self, segment: Segment, is_free: Callable[[], bool]) -> None:
        """Cache a segment for reuse; `is_free` is asked then whether no other process maps it."""
        if self._cached is not None:
            self._cached.close()
        if segment.size <= _MAX_CACHED_BYTES:
            self._cached, self._is_free = segment, is_free
        else:
            segment.close()


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Refers to a packed object. Small and picklable; valid while the sender keeps the segment.

    The segment holds the pickle, then each tensor storage and array, then the table of their offsets.

    Args:
        path: The segment, for processes on its host.
        code_bytes: Length of the pickle.
        table_start: Offset of the table.
        nbytes: Size of the segment.
    """

    path: str
    code_bytes: int
    table_start: int
    nbytes: int

    @property
    def extents(self) -> tuple[int, int, int]:
        """All its numbers."""
        return self.code_bytes, self.table_start, self.nbytes

    @classmethod
    def at(cls, path: str, extents: Sequence[int]) -> Payload:
        """The payload in a segment of this host, by its `extents`."""
        code_bytes, table_start, nbytes = extents
        return cls(path=path, code_bytes=code_bytes, table_start=table_start, nbytes=nbytes)


def pack(
    value: Any, *, names: Mapping[str, Any] | None = None, by_file: bool = True,
    segment_cache: SegmentCache | None = None, registries: bool = False,
) -> tuple[Payload, Segment]:  # fmt: skip
    """Pack an object by value: with the notebook's classes and functions, and with tensors and arrays out of band.

    Tensors that share memory still share it when unpacked, so tied weights stay tied. They arrive on the CPU.

    Args:
        value: Anything that can be pickled.
        names: The user's names for what is in it, for errors; by default it is "it".
        by_file: Whether tensors that lie in a file stay there: every receiver sees this host's files.
        segment_cache: Provides the segment; by default a new one is made.
        registries: See `pickler.dump`.

    Returns:
        The payload, and the segment to keep until every receiver has unpacked.

    Raises:
        TaskError: Something in `value` cannot be pickled.
    """
    try:
        code, buffers = pickler.dump(value, registries=registries, by_file=by_file)
    except Refusal as refusal:
        raise TaskError(refusal.sentence(names or {"it": value})) from refusal
    views = [buffer.raw() for buffer in buffers]
    regions, starts, written = _layout(views, len(code))
    end = sum(regions[-1])
    table = pickle.dumps((regions, [(start, len(view)) for start, view in zip(starts, views, strict=True)]))
    segment = (segment_cache or SegmentCache()).segment(end + len(table))
    segment.fill([(0, memoryview(code)), *((starts[i], views[i]) for i in written), (end, memoryview(table))])
    for view in views:
        view.release()  # here, and not when the garbage collector finds them in the pickler's cycles
    for buffer in buffers:
        buffer.release()
    payload = Payload(
        path=segment.path, code_bytes=len(code), table_start=end,
        nbytes=end + len(table),
    )  # fmt: skip
    return payload, segment


def unpack(payload: Payload) -> Any:
    """Unpack a payload. Tensors and arrays lie in a private mapping of the segment, so writes stay in this process."""
    map_ = _in_segment(payload)
    table: Any = map_(payload.table_start, payload.nbytes - payload.table_start)
    regions, extents = pickle.loads(table)
    memory = [map_(start, size) for start, size in regions]
    firsts = [start for start, _ in regions]
    buffers = []
    for start, size in extents:
        i = bisect.bisect(firsts, start) - 1
        buffers.append(memory[i][start - firsts[i] : start - firsts[i] + size])
    return pickler.load(memory[0][: payload.code_bytes], buffers)


def _layout(views: list[memoryview], start: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Offsets in a segment, from `start` on. Views that overlap, as an array and a tensor of it, overlap there too.

    Returns:
        Start and size of each region that gets its own mapping, the first from 0 on and with all small views; the
        offset of each view; the indices of the views to write (the others lie within one of these).
    """
    addresses = [np.frombuffer(view, np.uint8).__array_interface__["data"][0] if len(view) else 0 for view in views]
    joined: list[tuple[int, int, list[int]]] = []  # first and last address of overlapping views, and their indices
    written = []
    for i in sorted(range(len(views)), key=lambda i: (addresses[i], -len(views[i]))):
        first, last, members = addresses[i], addresses[i] + len(views[i]), list[int]()
        reached = joined[-1][1] if joined else 0
        if last > reached:
            written.append(i)
        if first < reached:
            first, _, members = joined.pop()
        members.append(i)
        joined.append((first, max(last, reached), members))
    end = common = start
    own_mappings: list[tuple[int, int]] = []
    starts = [start] * len(views)
    for first, last, members in sorted(joined, key=lambda each: each[1] - each[0] >= _OWN_MAPPING_BYTES):
        large = last - first >= _OWN_MAPPING_BYTES
        if large:
            end += -end % mmap.ALLOCATIONGRANULARITY
        end += (first - end) % _ALIGNMENT
        if large:
            own_mappings.append((end, last - first))
        for i in members:
            starts[i] = end + addresses[i] - first
        end += last - first
        common = common if large else end
    return [(0, common), *own_mappings], starts, written


def _in_segment(payload: Payload) -> Callable[[int, int], Any]:
    """Returns a function that maps a range of the segment privately, as a NumPy array; its slices keep the mapping."""
    maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
    _mapped[payload.path] = maps

    def map_(start: int, length: int) -> Any:
        before = start % mmap.ALLOCATIONGRANULARITY
        with os.fdopen(open_segment(payload.path), "rb") as file:
            mapping = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
        maps.add(mapping)
        return np.frombuffer(mapping, dtype=np.uint8)[before:]

    return map_


def is_released(path: str) -> bool:
    """Whether no object in this process uses the segment last unpacked from `path` any more."""
    if _mapped.get(path):
        gc.collect()
    if not _mapped.get(path):
        _mapped.pop(path, None)
    return path not in _mapped
