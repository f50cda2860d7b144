"""File memory: tensors that lie in a file, which other processes map without a copy and the system may page out.

A model that is larger than the memory of a process lies there: in a temporary file, or in the safetensors files that it
comes from. `pack` sends such a tensor as a place in the file. Each process that unpacks it maps the file privately, and
reads the pages that it uses.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch

from nbdist.core.transfer.segment_path import open_segment, segment_path
from nbdist.errors import TaskError

__all__ = ["Extent", "FileMemory", "extent_of", "has_extents", "map_extent"]

_SMALL_BYTES = 1 << 16
"""Smaller tensors stay in ordinary memory: a mapping is whole pages."""
_ON_DISK = Path("/var/tmp")
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Extent:
    """A place in a file.

    Args:
        path: As `segment_path` has it.
        start: Its first byte.
        nbytes: Its length.
        writable: Whether a write to the storage changes the file; else nothing may write to it.
    """

    path: str
    start: int
    nbytes: int
    writable: bool = False


_extents: dict[int, Extent] = {}
"""Where storages lie, by their addresses: of those that are what is in the file."""


class _Mapping(mmap.mmap):
    """A mapping that keeps the file open which it is of, so that other processes can open it."""

    file: FileMemory | None = None


class FileMemory:
    """A temporary file for tensors. It has no name, and is freed with the last tensor in any process.

    The file is in the folder for temporary files (``TMPDIR``), or in /var/tmp if that one is memory.
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
        self._end = 0

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape, strides and dtype of another one, of zeros, in the file. Local.

        Raises:
            TaskError: The disk is full.
        """
        # Of a tensor on the meta device, torch loads its symbolic shapes to make another: 2 s.
        layout = tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
        nbytes = layout.untyped_storage().nbytes()
        free = os.fstatvfs(self._file)
        if nbytes > free.f_bavail * free.f_frsize:
            raise TaskError(
                f"the weights need {nbytes / 2**30:,.1f} GiB more in {self._folder}, and "
                f"{free.f_bavail * free.f_frsize / 2**30:,.1f} GiB are free there: set TMPDIR to a larger folder."
            )
        start = self._end
        self._end += nbytes + -nbytes % mmap.ALLOCATIONGRANULARITY
        os.posix_fallocate(self._file, start, self._end - start)  # else a full disk were a fatal signal later
        mapping = _Mapping(self._file, nbytes, offset=start)
        mapping.file = self
        flat = _registered(mapping, 0, Extent(self._path, start, nbytes, writable=True))
        return flat.view(layout.dtype).as_strided(layout.shape, layout.stride())

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in the file; the tensor itself if it lies in such a file already, or is small. Local."""
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.nbytes < _SMALL_BYTES:
            return tensor
        extent = extent_of(tensor.untyped_storage())
        if extent is not None and extent.writable:
            return tensor
        return self.empty_like(tensor).copy_(tensor)


def extent_of(storage: torch.UntypedStorage) -> Extent | None:
    """The place in a file of which a storage is the content; None if it lies in ordinary memory. Local."""
    extent = _extents.get(storage.data_ptr())
    return extent if extent is not None and extent.nbytes == storage.nbytes() else None


def has_extents() -> bool:
    """Whether any storage of this process lies in a file. Local."""
    return bool(_extents)


def map_extent(extent: Extent, *, unchanged: bool = False) -> torch.Tensor:
    """Bytes of a file, mapped privately: a write is seen in this process only. Local.

    Args:
        extent: The place.
        unchanged: Whether nothing will write to it, so that this process can send it as a place too.

    Raises:
        ClusterError: The file is gone.
    """
    before = extent.start % mmap.ALLOCATIONGRANULARITY
    with os.fdopen(open_segment(extent.path, write=False), "rb") as file:
        mapping = _Mapping(file.fileno(), before + extent.nbytes, access=mmap.ACCESS_COPY, offset=extent.start - before)
    if unchanged:
        return _registered(mapping, before, extent)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=before)


def _registered(mapping: _Mapping, offset: int, extent: Extent) -> torch.Tensor:
    flat = torch.frombuffer(mapping, dtype=torch.uint8, offset=offset)
    _extents[flat.data_ptr()] = extent
    weakref.finalize(mapping, _extents.pop, flat.data_ptr(), None).atexit = False
    return flat


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
