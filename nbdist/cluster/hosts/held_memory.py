"""Held memory: shared memory that this process creates and keeps open, so that it outlives those that write it."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence

from nbdist.segment_path import open_segment, segment_path

__all__ = ["HeldMemory"]


class HeldMemory:
    """Shared memory by path. Thread-safe."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def hold(self, count: int) -> list[str]:
        """See `Host.hold`."""
        made = {}
        for _ in range(count):
            if hasattr(os, "memfd_create"):
                file = os.memfd_create("nbdist", os.MFD_CLOEXEC)
                made[segment_path(file, f"/proc/{os.getpid()}/fd/{file}")] = file
            else:
                file, name = tempfile.mkstemp(prefix="nbdist-")
                made[segment_path(file, name)] = file
        with self._lock:
            self._files.update(made)
        return list(made)

    def read(self, path: str, start: int, length: int) -> bytes:
        """See `Host.begin_read`; also memory that another process of this host holds.

        Raises:
            ClusterError: It is gone.
        """
        with self._lock:  # no other thread may release it meanwhile
            held = self._files.get(path)
            if held is not None:
                return _read(held, start, length)
        file = open_segment(path)
        try:
            return _read(file, start, length)
        finally:
            os.close(file)

    def write(self, path: str, start: int, content: bytes | memoryview) -> None:
        """See `Host.write_memory`; does nothing for memory that was released."""
        with self._lock:
            done, view = 0, memoryview(content)
            while path in self._files and done < len(view):
                done += os.pwrite(self._files[path], view[done:], start + done)

    def empty(self, paths: Sequence[str]) -> None:
        """See `Host.empty`."""
        with self._lock:
            for path in paths:
                if path in self._files:
                    os.ftruncate(self._files[path], 0)

    def release(self, paths: Sequence[str] | None = None) -> None:
        """See `Host.release`; by default all of it."""
        with self._lock:
            for path in list(self._files) if paths is None else paths:
                file = self._files.pop(path, None)
                if file is not None:
                    os.close(file)
                    if not hasattr(os, "memfd_create"):
                        os.unlink(path.rpartition(":")[0])


def _read(file: int, start: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(file, length, start)):  # at most 2 GiB at once
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return b"".join(parts)
