"""Handing objects over to other processes, their tensors through one shared-memory copy.

A *payload* is a pickled object whose tensors and arrays lie beside the pickle in one *segment*. On one host the segment
is anonymous shared memory that every process maps privately: nobody copies, a write stays with the writer, and the
memory is free when the last one lets go, however it died. To another host the segment travels as bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import itertools
import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nbdist.core.transfer import pickler
from nbdist.errors import ClusterError, TaskError

__all__ = ["Holder", "Payload", "Segment", "SegmentCache", "is_released", "open_segment", "pack", "unpack"]

_ALIGNMENT = 64
_APART_BYTES = 1 << 20  # what is larger is mapped by itself, so that its memory goes when it does
_THREADED_COPY_BYTES = 1 << 20
_KEPT_BYTES = 1 << 28  # a larger segment is not kept: its memory is worth more than the time to make it anew

_numbers = itertools.count()
_mapped: dict[str, weakref.WeakSet[mmap.mmap]] = {}
"""The mappings of segments that something in this process still lies in, by path."""


class Holder(Protocol):
    """Makes shared memory and holds it, for processes that it may outlive."""

    def hold(self) -> str:
        """New memory; returns its path."""

    def is_released(self, path: str) -> None:
        """The memory is not needed any more."""

    def let_go_later(self, path: str) -> None:
        """The same, said without waiting for anything: this thread may be waiting for the holder's answer already."""


def segment_path(file: int, place: str) -> str:
    """How others name the segment that this process has open: where it is, and which file that is."""
    found = os.fstat(file)
    return f"{place}:{found.st_dev}.{found.st_ino}"


def open_segment(path: str) -> int:
    """Open the segment with this path; returns its descriptor. Local.

    Raises:
        ClusterError: It is gone. Where it was there may be another file by now, for numbers are used again.
    """
    place = path.rpartition(":")[0]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        found = os.stat(place)  # first, for to open a file does something, if it is a pipe say
        if path == f"{place}:{found.st_dev}.{found.st_ino}":
            file = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            if path == segment_path(file, place):
                return file
            os.close(file)
    raise ClusterError(f"the shared memory {place} is gone, whoever held it has let go of it or ended: begin anew.")


class Segment:
    """Shared memory that the creating process holds open; others map it by `path`.

    Args:
        size: Bytes.
        holder: Who holds it too, until it is closed; None for this process alone.
        path: The one that the holder has, from a process before this; a new one by default.
    """

    def __init__(self, size: int, holder: Holder | None = None, path: str = "") -> None:
        self.number = next(_numbers)  # unlike a path, never another segment's
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
        """The segment as memory."""
        return mmap.mmap(self._file, self.size)

    @property
    def descriptor(self) -> int:
        """The open file, to be passed over a socket."""
        return self._file

    def fill(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Write bytes at their places: into new pages as a file, which saves a fault a page, and later as memory."""
        for start, piece in pieces:
            if self._filled and len(piece) >= _THREADED_COPY_BYTES and not piece.readonly:
                source = torch.frombuffer(piece, dtype=torch.uint8)  # torch copies with all its threads
                torch.frombuffer(self.buffer, dtype=torch.uint8, count=len(piece), offset=start).copy_(source)
                continue
            done = 0
            while done < len(piece):
                done += os.pwrite(self._file, piece[done:], start + done)
        self._filled = True

    def empty(self) -> None:
        """Give its memory back; it stays, with no bytes in it. Nobody may be using them."""
        os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Let go of the segment; processes that have mapped it keep it. Twice is fine."""
        if self._closed() and self._holder is not None:
            self._holder.is_released(self.path)

    def _closed(self) -> bool:
        """Close it here; returns whether it was open and is this process's to let go of."""
        if self._file < 0:
            return False
        os.close(self._file)
        self._file = -1
        if self._owner != os.getpid():
            return False  # a forked child has a descriptor of its own, and no more
        if self._name:
            os.unlink(self._name)
        return True

    def __del__(self) -> None:
        # The interpreter may be ending; then the system lets go of the segment.
        if os is not None and self._closed() and self._holder is not None:
            self._holder.let_go_later(self.path)


class SegmentCache:
    """Makes segments, and makes one again of a segment that came back: its pages are there already.

    Only when nobody maps it any more may a segment be written anew, for a private mapping shows what is written until
    its owner writes there itself.

    Args:
        holder: Who holds them too, see `Segment`.
    """

    def __init__(self, holder: Holder | None = None) -> None:
        self._holder = holder
        self._back: Segment | None = None
        self._free: Callable[[], bool] = lambda: False

    def segment(self, size: int) -> Segment:
        """A segment of at least `size` bytes."""
        back, self._back = self._back, None
        if back is not None and size <= back.size and self._free():
            return back
        if back is not None:
            back.close()
        return Segment(size, self._holder)

    def give_back(self, segment: Segment, free: Callable[[], bool]) -> None:
        """Keep a segment for the next time; `free` tells then whether all others have let go of it."""
        if self._back is not None:
            self._back.close()
        if segment.size <= _KEPT_BYTES:
            self._back, self._free = segment, free
        else:
            segment.close()


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Where a packed object lies. Small and picklable; valid while the packer keeps the segment.

    The segment holds the pickle, then each tensor storage and array, then the table of their places.

    Args:
        path: The segment, for processes on the packer's host.
        inline: The segment's bytes, for others; None where a path is enough.
        code_bytes: Length of the pickle.
        table_start: Where the table begins.
        nbytes: Size of the segment.
    """

    path: str
    inline: bytes | None
    code_bytes: int
    table_start: int
    nbytes: int


def pack(
    value: Any, *, name: str = "", inline: bool = False, segment_cache: SegmentCache | None = None
) -> tuple[Payload, Segment]:  # fmt: skip
    """Pack `value` by value: classes and functions of a notebook travel with it, tensors and arrays beside it.

    Tensors that share memory share it still on the other side, so tied weights stay tied. They arrive on the CPU.

    Args:
        value: Anything that can be pickled.
        name: What the user calls it, for errors.
        inline: Whether the payload holds the bytes too, for receivers on other hosts.
        segment_cache: Where the segment comes from; by default it is new.

    Returns:
        The payload, and the segment to keep until every receiver has unpacked.

    Raises:
        TaskError: Something in `value` cannot be pickled.
    """
    try:
        code, buffers = pickler.dump(value)
    except Exception as error:  # whatever a __reduce__ of the user's raises
        what = f"{name}: it" if name else "it"
        raise TaskError(f"{what} cannot be sent to another process: {error}.") from error
    views = [buffer.raw() for buffer in buffers]
    regions, starts, written = _laid_out(views, len(code))
    end = sum(regions[-1])
    table = pickle.dumps((regions, [(start, len(view)) for start, view in zip(starts, views, strict=True)]))
    segment = (segment_cache or SegmentCache()).segment(end + len(table))
    segment.fill([(0, memoryview(code)), *((starts[i], views[i]) for i in written), (end, memoryview(table))])
    for view in views:
        view.release()  # before the garbage collector meets them in the pickler's cycles
    for buffer in buffers:
        buffer.release()
    payload = Payload(
        path=segment.path, inline=segment.buffer[:] if inline else None, code_bytes=len(code), table_start=end,
        nbytes=end + len(table),
    )  # fmt: skip
    return payload, segment


def unpack(payload: Payload) -> Any:
    """Unpack a payload. Tensors and arrays lie in a private mapping of the segment: writing is safe, and not seen."""
    map_ = _in_memory(payload.inline) if payload.inline is not None else _in_segment(payload)
    table: Any = map_(payload.table_start, payload.nbytes - payload.table_start)
    regions, places = pickle.loads(table)
    memory = [map_(start, size) for start, size in regions]
    firsts = [start for start, _ in regions]
    buffers = []
    for start, size in places:
        i = bisect.bisect(firsts, start) - 1
        buffers.append(memory[i][start - firsts[i] : start - firsts[i] + size])
    return pickler.load(memory[0][: payload.code_bytes], buffers)


def _laid_out(views: list[memoryview], start: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Where memory goes in a segment, from `start` on; what overlaps does so there, as an array and a tensor of it.

    Returns:
        Start and size of each region that is mapped by itself, the first with what is small, and what is before it;
        where each view begins; which of them have to be written, for the others lie within one of these.
    """
    addresses = [np.frombuffer(view, np.uint8).__array_interface__["data"][0] if len(view) else 0 for view in views]
    joined: list[tuple[int, int, list[int]]] = []  # from where to where in our memory, and who lies there
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
    apart: list[tuple[int, int]] = []
    starts = [start] * len(views)
    for first, last, members in sorted(joined, key=lambda each: each[1] - each[0] >= _APART_BYTES):
        large = last - first >= _APART_BYTES
        if large:
            end += -end % mmap.ALLOCATIONGRANULARITY
        end += (first - end) % _ALIGNMENT
        if large:
            apart.append((end, last - first))
        for i in members:
            starts[i] = end + addresses[i] - first
        end += last - first
        common = common if large else end
    return [(0, common), *apart], starts, written


def _in_memory(content: bytes) -> Callable[[int, int], Any]:
    memory: Any = np.frombuffer(bytearray(content), dtype=np.uint8)
    return lambda start, length: memory[start : start + length]


def _in_segment(payload: Payload) -> Callable[[int, int], Any]:
    """Maps parts of a segment privately: each as NumPy memory, whose slices are buffers and keep the mapping alive."""
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
    """Whether nothing in this process lies any more in the segment that was last unpacked from `path`."""
    if _mapped.get(path):
        gc.collect()
    if not _mapped.get(path):
        _mapped.pop(path, None)
    return path not in _mapped
