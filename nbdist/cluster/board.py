"""The board: the newest that a rank has to say, in memory that the notebook reads whenever it likes.

To publish costs the rank a copy, and nobody else anything. A message for each update, as ipyparallel sends them, was
measured at about a millisecond of processor time in each of three processes.
"""

from __future__ import annotations

import mmap
import struct
import zlib

__all__ = ["BOARD_BYTES", "Board"]

BOARD_BYTES = 1 << 20
"""Pages that are not written take no memory."""
_HEAD = struct.Struct("=QII")  # how often it was written, the length, the checksum


class Board:
    """One rank's, which alone writes it.

    Args:
        path: A file of `BOARD_BYTES` in memory, which the notebook holds.
    """

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), BOARD_BYTES)
        self._count = 0

    def write(self, data: bytes) -> bool:
        """Put `data` in the place of what is there; returns whether it fits."""
        if len(data) > BOARD_BYTES - _HEAD.size:
            return False
        self._count += 1
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        self._memory[: _HEAD.size] = _HEAD.pack(self._count, len(data), zlib.crc32(data))
        return True

    def read(self) -> bytes | None:
        """What is there; None where it was read before, or is being written at this moment."""
        count, length, checksum = _HEAD.unpack(self._memory[: _HEAD.size])
        if count == self._count:
            return None
        data = self._memory[_HEAD.size : _HEAD.size + length]
        if zlib.crc32(data) != checksum:
            return None
        self._count = count
        return data
