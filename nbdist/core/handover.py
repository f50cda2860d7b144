"""Handing objects over to other processes, their tensors through one shared-memory copy.

A *parcel* is a pickled object whose tensors and arrays lie beside the pickle in one *segment*. On one host the segment
is anonymous shared memory that every process maps privately: nobody copies, a write stays with the writer, and the
memory is free when the last one lets go, however it died. To another host the segment travels as bytes.
"""

from __future__ import annotations

import functools
import gc
import io
import itertools
import mmap
import os
import pickle
import tempfile
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import numpy as np
import torch

from nbdist.errors import TaskError

__all__ = ["Holder", "Outbox", "Parcel", "Segment", "host_id", "let_go", "pack", "unpack"]

_HOST_VARIABLE = "NBDIST_HOST"
_ALIGNMENT = 64
_APART_BYTES = 1 << 20  # what is larger is mapped by itself, so that its memory goes when it does
_THREADED_COPY_BYTES = 1 << 20
_KEPT_BYTES = 1 << 28  # a larger segment is not kept: its memory is worth more than the time to make it anew

_numbers = itertools.count()
_mapped: dict[str, weakref.WeakSet[mmap.mmap]] = {}
"""The mappings of segments that something in this process still lies in, by path."""


def host_id() -> str:
    """Names the running system: processes with the same one can map each other's segments.

    ``$NBDIST_HOST`` names it where that cannot be seen from inside, as in containers that share a kernel but no files.
    """
    if os.environ.get(_HOST_VARIABLE):
        return os.environ[_HOST_VARIABLE]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # a container has process numbers of its own
    except OSError:
        return f"{uuid.getnode():x}"


class Holder(Protocol):
    """Makes shared memory and holds it, for processes that it may outlive."""

    def hold(self) -> str:
        """New memory; returns its path."""

    def let_go(self, path: str) -> None:
        """The memory is not needed any more."""


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
        if path:
            self.path = path
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.size = os.fstat(self._file).st_size
            return
        self.size = max(size, 1)
        if holder is not None:
            self.path = holder.hold()
            self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        elif hasattr(os, "memfd_create"):
            self._file = os.memfd_create("nbdist", os.MFD_CLOEXEC)
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file, self._name = tempfile.mkstemp(prefix="nbdist-")
            self.path = self._name
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

    def close(self) -> None:
        """Let go of the segment; processes that have mapped it keep it. Twice is fine."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if self._name:
                os.unlink(self._name)
            if self._holder is not None:
                self._holder.let_go(self.path)

    def __del__(self) -> None:
        if os is not None:  # it is, when the interpreter ends; then the system lets go of the segment
            self.close()


class Outbox:
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
class Parcel:
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


def pack(value: Any, *, inline: bool = False, outbox: Outbox | None = None) -> tuple[Parcel, Segment]:
    """Pack `value` by value: classes and functions of a notebook travel with it, tensors and arrays beside it.

    Tensors that share memory share it still on the other side, so tied weights stay tied. They arrive on the CPU.

    Args:
        value: Anything that can be pickled.
        inline: Whether some receiver is on another host.

    Returns:
        The parcel, and the segment to keep until every receiver has unpacked.

    Args:
        value: The object.
        inline: Whether the parcel holds the bytes too, for receivers on other hosts.
        outbox: Where the segment comes from; by default it is new.

    Raises:
        TaskError: Something in `value` cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(value)
    except Exception as error:  # whatever a __reduce__ of the user's raises
        raise TaskError(f"it cannot be sent to another process: {error}.") from error
    code = stream.getvalue()
    views = [buffer.raw() for buffer in pickler.buffers]
    end = len(code)
    starts = [0] * len(views)
    for i in sorted(range(len(views)), key=lambda i: len(views[i]) >= _APART_BYTES):  # small ones lie together
        end += -end % (mmap.ALLOCATIONGRANULARITY if len(views[i]) >= _APART_BYTES else _ALIGNMENT)
        starts[i], end = end, end + len(views[i])
    places = [(start, len(view)) for start, view in zip(starts, views, strict=True)]
    table = pickle.dumps(places)
    segment = (outbox or Outbox()).segment(end + len(table))
    segment.fill([(0, memoryview(code)), *zip(starts, views, strict=True), (end, memoryview(table))])
    for view in views:
        view.release()  # before the garbage collector meets them in the pickler's cycles
    for buffer in pickler.buffers:
        buffer.release()
    parcel = Parcel(
        path=segment.path, inline=segment.buffer[:] if inline else None, code_bytes=len(code), table_start=end,
        nbytes=end + len(table),
    )  # fmt: skip
    return parcel, segment


def unpack(parcel: Parcel) -> Any:
    """Unpack a parcel. Tensors and arrays lie in a private mapping of the segment: writing is safe, and not seen."""
    map_ = _in_memory(parcel.inline) if parcel.inline is not None else _in_segment(parcel)
    table: Any = map_(parcel.table_start, parcel.nbytes - parcel.table_start)
    places = pickle.loads(table)
    common = map_(0, max([parcel.code_bytes, *(start + size for start, size in places if size < _APART_BYTES)]))
    buffers = [map_(start, size) if size >= _APART_BYTES else common[start : start + size] for start, size in places]
    return pickle.loads(common[: parcel.code_bytes], buffers=buffers)


def _in_memory(content: bytes) -> Callable[[int, int], Any]:
    memory: Any = np.frombuffer(bytearray(content), dtype=np.uint8)
    return lambda start, length: memory[start : start + length]


def _in_segment(parcel: Parcel) -> Callable[[int, int], Any]:
    """Maps parts of a segment privately: each as NumPy memory, whose slices are buffers and keep the mapping alive."""
    maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
    _mapped[parcel.path] = maps  # of the segment that has this path now

    def map_(start: int, length: int) -> Any:
        before = start % mmap.ALLOCATIONGRANULARITY
        with open(parcel.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
        maps.add(mapping)
        return np.frombuffer(mapping, dtype=np.uint8)[before:]

    return map_


def let_go(path: str) -> bool:
    """Whether nothing in this process lies any more in the segment that was last unpacked from `path`."""
    if _mapped.get(path):
        gc.collect()
    if not _mapped.get(path):
        _mapped.pop(path, None)
    return path not in _mapped


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle has no types
    """Pickles by value and keeps storages and arrays aside, as `buffers`."""

    def __init__(self, file: io.BytesIO) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)
        self._storages: dict[tuple[str, int], _Storage] = {}

    def reducer_override(self, value: Any) -> Any:
        """Take plain tensors apart; everything else is cloudpickle's."""
        if isinstance(value, io.IOBase) and not isinstance(value, (io.BytesIO, io.StringIO)):
            # cloudpickle would put a copy of its content in its place, unasked
            raise pickle.PicklingError(f"it holds an open file ({getattr(value, 'name', value)!r})")
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
            return super().reducer_override(value)
        plain = value.detach().resolve_conj().resolve_neg()
        storage = plain.untyped_storage()
        key = (str(plain.device), storage.data_ptr())
        if key not in self._storages:
            self._storages[key] = _Storage(storage)
        place = (plain.storage_offset(), tuple(plain.shape), plain.stride())
        return _as_tensor, (self._storages[key], plain.dtype, *place, value.requires_grad), value.__dict__ or None


class _Storage:
    """A tensor storage on its way; pickled once, however many tensors view it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._original = storage  # keeps the address, by which the pickler knows it, taken
        self._bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()

    def __reduce_ex__(self, protocol: Any) -> Any:
        content: Any = self._bytes.numpy()
        return _as_storage, (pickle.PickleBuffer(content),)


def _as_storage(view: memoryview) -> torch.UntypedStorage:
    return torch.frombuffer(view, dtype=torch.uint8).untyped_storage() if len(view) else torch.UntypedStorage(0)


def _as_tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:  # fmt: skip
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride).requires_grad_(requires_grad)
