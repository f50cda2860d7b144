"""File memory: tensors that lie in a file, which other processes map without a copy and the system may page out.

A model that is larger than the memory of a process lies there. `pack` sends such a tensor as a place in the file. Each
process that unpacks it maps the file privately, and reads the pages that it uses.
"""

from __future__ import annotations

import contextlib
import contextvars
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nbdist.errors import TaskError
from nbdist.segment_path import open_segment, segment_path

__all__ = ["SMALL_BYTES", "Extent", "FileMemory", "extent_of", "has_extents", "map_extent", "mapping_together"]

SMALL_BYTES = 1 << 16
"""Smaller tensors stay in ordinary memory: a place in the file is whole pages."""
_FIRST_REGION = 1 << 28
_ON_DISK = Path("/var/tmp")
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Extent:
    """A place in a file.

    Args:
        path: As `segment_path` has it.
        region: First byte and length of the part of the file that is mapped as one.
        start: Its first byte in that part.
        nbytes: Its length.
    """

    path: str
    region: tuple[int, int]
    start: int
    nbytes: int


_extents: dict[int, Extent] = {}
"""Where storages lie, by their addresses: of those whose writes are seen in the file."""


class _Mapping(mmap.mmap):
    """A mapping that keeps the file open which it is of, so that other processes can open it."""

    file: FileMemory | None = None


class FileMemory:
    """A temporary file for tensors. It has no name, and is freed with the last tensor in any process.

    The file is in the folder for temporary files (``TMPDIR``), or in /var/tmp if that one is memory. It is mapped in
    few parts, each as large as all before it, because a process may not have many mappings of files.
    """

    def __init__(self) -> None:
        folder = tempfile.gettempdir()
        if _file_system(folder) in _IN_MEMORY and _ON_DISK.is_dir():
            folder = str(_ON_DISK)
        self._folder = folder
        self._file, name = tempfile.mkstemp(prefix="nbdist-", dir=folder)
        os.unlink(name)
        weakref.finalize(self, os.close, self._file).atexit = False
        self._path = segment_path(self._file, f"/proc/{os.getpid()}/fd/{self._file}")
        self._region = (0, 0)
        self._mapping: weakref.ref[_Mapping] | None = None
        self._used = 0  # of the region

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape, strides and dtype of another one, in the file; in memory if it is small. Local.

        Raises:
            TaskError: The disk is full.
        """
        # Of a tensor on the meta device, torch loads its symbolic shapes to make another: 2 s.
        layout = tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
        nbytes = layout.untyped_storage().nbytes()
        if nbytes < SMALL_BYTES:
            return torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype)
        return self.bytes(nbytes).view(layout.dtype).as_strided(layout.shape, layout.stride())

    def bytes(self, nbytes: int) -> torch.Tensor:
        """So many zeros, ``(nbytes,)``, in the file. Local.

        Raises:
            TaskError: The disk is full.
        """
        free = os.fstatvfs(self._file)
        if nbytes > free.f_bavail * free.f_frsize:
            raise TaskError(
                f"the weights need {nbytes / 2**30:,.1f} GiB more in {self._folder}, and "
                f"{free.f_bavail * free.f_frsize / 2**30:,.1f} GiB are free there: set TMPDIR to a larger folder."
            )
        mapping = None if self._mapping is None else self._mapping()
        if mapping is None or self._used + nbytes > self._region[1]:
            begin = sum(self._region)
            length = max(_FIRST_REGION, begin, nbytes)
            length += -length % mmap.ALLOCATIONGRANULARITY
            os.ftruncate(self._file, begin + length)  # without blocks on the disk
            mapping = _Mapping(self._file, length, offset=begin)
            mapping.file = self
            self._region, self._mapping, self._used = (begin, length), weakref.ref(mapping), 0
        start = self._used
        self._used += nbytes + -nbytes % mmap.PAGESIZE
        os.posix_fallocate(self._file, self._region[0] + start, nbytes)  # else a full disk were a fatal signal later
        flat = torch.frombuffer(mapping, dtype=torch.uint8, offset=start, count=nbytes)
        _extents[flat.data_ptr()] = Extent(self._path, self._region, start, nbytes)
        weakref.finalize(mapping, _extents.pop, flat.data_ptr(), None).atexit = False
        return flat


def extent_of(storage: torch.UntypedStorage) -> Extent | None:
    """The place in a file of which a storage is the content; None if it lies in ordinary memory. Local."""
    extent = _extents.get(storage.data_ptr())
    return extent if extent is not None and extent.nbytes == storage.nbytes() else None


def has_extents() -> bool:
    """Whether any storage of this process lies in a file. Local."""
    return bool(_extents)


_together: contextvars.ContextVar[dict[tuple[str, tuple[int, int]], _Mapping]] = contextvars.ContextVar("_together")


@contextlib.contextmanager
def mapping_together() -> Iterator[None]:
    """Context in which tensors of one part of a file are mapped as one. Local."""
    token = _together.set({})
    try:
        yield
    finally:
        _together.reset(token)


def map_extent(extent: Extent) -> torch.Tensor:
    """Bytes of a file, mapped privately: a write is seen in this process only. Local, within `mapping_together`.

    Raises:
        ClusterError: The file is gone.
    """
    mapped, key = _together.get(), (extent.path, extent.region)
    if key not in mapped:
        begin, length = extent.region
        with os.fdopen(open_segment(extent.path), "rb") as file:
            mapped[key] = _Mapping(file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
    return torch.frombuffer(mapped[key], dtype=torch.uint8, offset=extent.start, count=extent.nbytes)


def _file_system(folder: str) -> str:
    """The type of the file system of a folder; empty if unknown."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    real, found = os.path.realpath(folder), ("", "")
    for line in mounts.read_text().splitlines():
        _, place, kind, *_ = line.split()
        if (real == place or real.startswith(place.rstrip("/") + "/")) and len(place) >= len(found[0]):
            found = place, kind
    return found[1]
