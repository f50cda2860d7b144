"""The board: the newest that a rank has to say, in memory that the notebook reads whenever it likes.

To publish costs the rank a copy, and nobody else anything. A message for each update, as ipyparallel sends them, was
measured at about a millisecond of processor time in each of three processes.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib

from nbdist.core.transfer.payload import open_segment

__all__ = ["BOARD_BYTES", "Board"]

BOARD_BYTES = 1 << 20
"""Pages that are not written take no memory."""
_HEAD = struct.Struct("=QII")  # which writing this was, the length, the checksum
_STARTS = (0, BOARD_BYTES // 8)
_ENDS = (BOARD_BYTES // 8, BOARD_BYTES)


class Board:
    """One rank's, which alone writes it. It has two places, so that what comes often hides nothing that comes seldom.

    Args:
        path: Of a segment of `BOARD_BYTES`, which the notebook holds.
    """

    def __init__(self, path: str) -> None:
        with os.fdopen(open_segment(path), "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), BOARD_BYTES)
        self._count = 0
        self._read = [0, 0]

    def write(self, data: bytes, *, seldom: bool = False) -> bool:
        """Put `data` in the place of what was there; returns whether it fits."""
        start, end = _STARTS[seldom], _ENDS[seldom]
        first = start + _HEAD.size
        if first + len(data) > end:
            return False
        self._count += 1
        self._memory[first : first + len(data)] = data
        self._memory[start:first] = _HEAD.pack(self._count, len(data), zlib.crc32(data))
        return True

    def read(self) -> list[bytes]:
        """What was not read before, in the order in which it was written; not what is being written right now."""
        found = []
        for place, start in enumerate(_STARTS):
            first = start + _HEAD.size
            count, length, checksum = _HEAD.unpack(self._memory[start:first])
            if count == self._read[place]:
                continue
            data = self._memory[first : first + length]
            if zlib.crc32(data) == checksum:
                self._read[place] = count
                found.append((count, data))
        return [data for _, data in sorted(found)]
