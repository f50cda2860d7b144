"""Paths of files that processes open through each other, and that say which file is meant."""

from __future__ import annotations

import contextlib
import os

from nbdist.errors import ClusterError

__all__ = ["SegmentGoneError", "open_segment", "segment_path"]


class SegmentGoneError(ClusterError):
    """The process that held a segment has closed it, or ended."""


def segment_path(file: int, place: str) -> str:
    """The path by which other processes open a segment: with device and inode, which `open_segment` checks."""
    found = os.fstat(file)
    return f"{place}:{found.st_dev}.{found.st_ino}"


def open_segment(path: str) -> int:
    """Open the segment with this path; returns its descriptor. Local.

    Raises:
        SegmentGoneError: It is gone; descriptor numbers are reused, so the place may be another file by now.
    """
    place = path.rpartition(":")[0]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        found = os.stat(place)  # before opening, because opening another file may have effects, a pipe's for one
        if path == f"{place}:{found.st_dev}.{found.st_ino}":
            file = os.open(place, os.O_RDWR | os.O_CLOEXEC)
            if path == segment_path(file, place):
                return file
            os.close(file)
    raise SegmentGoneError(
        f"the shared memory {place} is gone, the process that held it closed it or ended: start again."
    )
