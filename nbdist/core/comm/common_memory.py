"""Memory common to the ranks of a host: mapped by each as shared memory, and once more privately."""

from __future__ import annotations

import mmap
import os

import torch

__all__ = ["CommonMemory"]

_PAGE_MAP = "/proc/self/pagemap"
# Of an entry's last byte, see pagemap.rst of the Linux kernel's documentation.
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20


class CommonMemory:
    """One segment, mapped twice.

    Args:
        shared: The shared mapping.
        private: The private (copy-on-write) mapping of the same memory.

    Attributes:
        shared: The bytes that all ranks read and write.
        private: The same bytes, for this rank alone: a page that it writes here becomes its own, and later writes of
            other ranks to that page are not visible in it.
    """

    def __init__(self, shared: mmap.mmap, private: mmap.mmap) -> None:
        self.shared = torch.frombuffer(shared, dtype=torch.uint8)
        self.private = torch.frombuffer(private, dtype=torch.uint8)
        self._mapping = private

    def own_pages(self) -> list[int] | None:
        """The offset of each private page that this rank has written; None if the system does not say. Local.

        Linux knows them, however they were written: 0.7 ms for 200 MB.
        """
        address = self.private.data_ptr()
        pages = -(-len(self._mapping) // mmap.PAGESIZE)
        try:
            with open(_PAGE_MAP, "rb", buffering=0) as file:
                entries = os.pread(file.fileno(), 8 * pages, 8 * (address // mmap.PAGESIZE))
        except OSError:  # not Linux, or not permitted
            return None
        if len(entries) < 8 * pages:
            return None
        kinds = torch.frombuffer(bytearray(entries), dtype=torch.uint8)[7::8]
        own = ((kinds & (_PRESENT | _SWAPPED)) != 0) & ((kinds & _OF_FILE) == 0)
        return [mmap.PAGESIZE * int(page) for page in own.nonzero()]

    def drop_own_pages(self) -> None:
        """Give up the pages that this rank has written privately: it sees the common values there again. Local."""
        self._mapping.madvise(mmap.MADV_DONTNEED)
