"""The status board: shared memory in which a rank publishes its newest state, and which the notebook polls.

Publishing costs the rank one copy, and other processes nothing. An ipyparallel message per update was measured at about
1 ms of CPU time in each of three processes.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Sequence

from nbdist.segment_path import open_segment

__all__ = ["BOARD_BYTES", "Board", "BoardReader", "MappedReader"]

BOARD_BYTES = 1 << 20
"""Pages that are never written take no memory."""
_HEAD = struct.Struct("=QII")  # count of writes, length in bytes, checksum
_STARTS = (0, BOARD_BYTES // 8)
_ENDS = (BOARD_BYTES // 8, BOARD_BYTES)
_AT_FIRST = (4096, _HEAD.size)
"""What a reader asks for before it knows the length: mostly all of the frequent place, and of the other its head."""


class Board:
    """One rank's board; only that rank writes. Two places, so that frequent data does not overwrite rare data.

    Args:
        path: Of shared memory, which the notebook or its agent holds open.
    """

    def __init__(self, path: str) -> None:
        self._memory = _map(path)
        self._count = 0

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


class BoardReader:
    """What one reader knows of one board, whose memory it reads by itself."""

    def __init__(self) -> None:
        self._read = [0, 0]
        self._wanted = list(_AT_FIRST)

    @property
    def places(self) -> list[tuple[int, int]]:
        """First byte and length of the memory to read next."""
        return list(zip(_STARTS, self._wanted, strict=True))

    def new(self, contents: Sequence[bytes]) -> list[bytes]:
        """Data not read before, oldest first, of the memory at `places`.

        The checksum rejects data that is being written now. While some is longer than `places`, nothing is returned,
        for what is older comes first; the next `places` have all of it.
        """
        found: list[tuple[int, int, bytes]] = []
        whole = True
        for place, content in enumerate(contents):
            if len(content) < _HEAD.size:
                continue  # nothing was written yet
            count, length, checksum = _HEAD.unpack(content[: _HEAD.size])
            data = content[_HEAD.size : _HEAD.size + length]
            if count == self._read[place]:
                continue
            if len(data) < length:
                self._wanted[place] = min(_HEAD.size + length, _ENDS[place] - _STARTS[place])
                whole = False
            elif zlib.crc32(data) == checksum:
                found.append((count, place, data))
        if not whole:
            return []
        for count, place, _ in found:
            self._read[place], self._wanted[place] = count, _AT_FIRST[place]
        return [data for _, _, data in sorted(found)]


class MappedReader:
    """Reads one board that this process can map.

    Args:
        path: Of the board, which is held open.
    """

    def __init__(self, path: str) -> None:
        self._memory = _map(path)
        self._reader = BoardReader()

    def read(self) -> list[bytes]:
        """Data not read before, oldest first."""
        for _ in range(2):  # a second look has all of what is longer than expected
            contents = [self._memory[start : start + length] for start, length in self._reader.places]
            if found := self._reader.new(contents):
                return found
        return []


def _map(path: str) -> mmap.mmap:
    """Map a board, which its first user makes as large as it may become."""
    with os.fdopen(open_segment(path), "r+b") as file:
        if os.fstat(file.fileno()).st_size < BOARD_BYTES:
            os.ftruncate(file.fileno(), BOARD_BYTES)
        return mmap.mmap(file.fileno(), BOARD_BYTES)
