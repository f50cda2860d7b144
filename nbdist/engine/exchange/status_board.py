"""The status board: shared memory in which a rank publishes its newest state, and which the notebook polls.

Publishing costs the rank one copy, and other processes nothing. An ipyparallel message per update was measured at about
1 ms of CPU time in each of three processes.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib

from nbdist.segment_path import open_segment

__all__ = ["BOARD_BYTES", "Board"]

BOARD_BYTES = 1 << 20
"""Pages that are never written take no memory."""
_HEAD = struct.Struct("=QII")  # count of writes, length in bytes, checksum
_STARTS = (0, BOARD_BYTES // 8)
_ENDS = (BOARD_BYTES // 8, BOARD_BYTES)


class Board:
    """One rank's board; only that rank writes. Two places, so that frequent data does not overwrite rare data.

    Args:
        path: Of a segment of `BOARD_BYTES`, held open by the notebook.
    """

    def __init__(self, path: str) -> None:
        with os.fdopen(open_segment(path), "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), BOARD_BYTES)
        self._count = 0
        self._read = [0, 0]

    def write(self, data: bytes, *, seldom: bool = False) -> bool:
        """Replace the data of one place; returns whether it fits. The header is written last, after its data."""
        start, end = _STARTS[seldom], _ENDS[seldom]
        first = start + _HEAD.size
        if first + len(data) > end:
            return False
        self._count += 1
        self._memory[first : first + len(data)] = data
        self._memory[start:first] = _HEAD.pack(self._count, len(data), zlib.crc32(data))
        return True

    def read(self) -> list[bytes]:
        """Data not read before, oldest first. The checksum rejects data that is being written now."""
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
