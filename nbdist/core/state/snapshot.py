"""Snapshots: the state of a training in memory that outlives the ranks.

Whoever starts the ranks makes the memory and holds it; each rank writes its share, in turn into one of two slots. A
slot says which step it holds only when it is complete, so that a rank may be killed at any moment. No rank is more than
a step ahead of another, hence every rank still has the snapshot that all of them have completed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nbdist.core.state.tensor_buffer import TensorBuffer, TensorLayout
from nbdist.core.transfer.payload import Holder, Segment, open_segment

__all__ = ["SLOTS", "RankSnapshots", "SnapshotBuffer", "SnapshotStore", "newest", "read"]

SLOTS = 3
"""Of each rank: two in turn, and one more while another is being written to disk."""
_STEP = struct.Struct("<q")  # one word, which is there as a whole or not at all
_HEAD = struct.Struct("<qqqq")
_REACHED = slice(64, 64 + _STEP.size)  # behind the head
_HEAD_BYTES = 4096
_NOTHING = -1


class Head(NamedTuple):
    """What a slot says of the snapshot that it holds.

    Args:
        step: Steps that were done; -1 where it holds none.
        ended: Epochs and rows that had ended, which tells apart what has the same step.
        ranks: How many ranks have written one.
        nbytes: Length of the image.
    """

    step: int
    ended: int
    ranks: int
    nbytes: int


_EMPTY = Head(_NOTHING, 0, 0, 0)


class SnapshotBuffer:
    """Shared memory for one snapshot of one rank.

    Args:
        path: Of a segment that somebody holds; it grows as needed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._memory: Any = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._layout: TensorLayout | None = None
        self._start = 0
        self._views: list[torch.Tensor] = []
        self.pinned = False

    @property
    def head(self) -> Head:
        """What it holds."""
        if self._memory is None and not self._map(0):
            return _EMPTY
        return Head._make(_HEAD.unpack(self._memory[: _HEAD.size]))

    @property
    def image(self) -> torch.Tensor:
        """``(bytes,)`` of uint8: the image of the snapshot that the slot holds."""
        return self._bytes[_HEAD_BYTES : _HEAD_BYTES + self.head.nbytes]

    def write(
        self, moment: tuple[int, int], ranks: int, layout: TensorLayout, tensors: Mapping[str, torch.Tensor], text: str
    ) -> None:
        """Write a snapshot; until that is done the slot holds none. Local.

        Args:
            moment: When, see `TrainProgress.moment`.
            ranks: How many ranks write one.
            layout: Of `tensors`.
            tensors: What is to be kept.
            text: What else is.
        """
        header = layout.header(text)
        nbytes = len(header) + layout.data_bytes
        self._map(_HEAD_BYTES + nbytes)
        self._memory[: _STEP.size] = _STEP.pack(_NOTHING)
        start = _HEAD_BYTES + len(header)
        self._memory[_HEAD_BYTES:start] = header
        if self._layout is not layout or self._start != start:
            self._layout, self._start = layout, start
            places = [layout.places[key] for key in tensors]
            flats = [self._bytes[start + first : start + first + length] for first, length in places]
            self._views = [f.view(t.dtype).view(t.shape) for f, t in zip(flats, tensors.values(), strict=True)]
        if self._views:
            torch._foreach_copy_(self._views, list(tensors.values()))
        head = _HEAD.pack(*moment, ranks, nbytes)
        self._memory[_STEP.size : _HEAD.size] = head[_STEP.size :]
        self._memory[: _STEP.size] = head[: _STEP.size]

    @property
    def reached(self) -> int:
        """The last step that was noted here, or kept; -1 for none."""
        head = self.head
        noted = 0 if self._memory is None else _STEP.unpack(self._memory[_REACHED])[0]
        return max(head.step, noted - 1)

    def note(self, step: int) -> None:
        """Write down that a step is done, whether it is kept or not. Local; a fraction of a microsecond."""
        if not self._bytes.numel():
            self._map(_HEAD_BYTES)
            if not self.head.ranks:
                self._memory[: _STEP.size] = _STEP.pack(_NOTHING)
        self._memory[_REACHED] = _STEP.pack(step + 1)

    def _map(self, nbytes: int) -> bool:
        """Map the file, grown to `nbytes` where it is smaller; whether there is something in it."""
        if self._memory is not None and len(self._memory) >= nbytes:
            return True
        with os.fdopen(open_segment(self.path), "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if size < nbytes:
                size = nbytes + nbytes // 8
                os.ftruncate(file.fileno(), size)
            if size < _HEAD_BYTES:
                return False
            self._memory = mmap.mmap(file.fileno(), size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._layout = None
        return True


class RankSnapshots:
    """The slots of one rank, which alone writes them.

    Args:
        paths: Of `SLOTS` segments.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._slots = [SnapshotBuffer(path) for path in paths]

    def write(
        self, moment: tuple[int, int], ranks: int, layout: TensorLayout, tensors: Mapping[str, torch.Tensor], text: str
    ) -> SnapshotBuffer:
        """Write a snapshot over the older of two, or over that of the same moment; returns where.

        The same moment may be kept twice without a word from the other ranks in between: the one before it stays.
        """
        free = [slot for slot in self._slots if not slot.pinned]
        again = [slot for slot in free if slot.head[:2] == moment]
        slot = again[0] if again else min(free[:2], key=lambda slot: slot.head[:2])
        slot.write(moment, ranks, layout, tensors, text)
        return slot

    def note(self, step: int) -> None:
        """Write down that a step is done; see `SnapshotStore.reached`. Local."""
        self._slots[0].note(step)

    def narrow(self) -> None:
        """Write to one slot only, from now on: what goes to disk has to pass through memory. Local, before any write.

        While that is being written there is no snapshot.
        """
        del self._slots[1:]


class SnapshotStore:
    """The memory of all ranks' snapshots. Made by who starts the ranks, on their host; the memory goes when this does.

    Args:
        ranks: How many.
        holder: Who holds the memory too, see `Segment`.
        paths: Where it is, of an earlier process; new by default.
    """

    def __init__(self, ranks: int, holder: Holder | None = None, paths: Sequence[Sequence[str]] = ()) -> None:
        self._holder = holder
        self._segments = [[Segment(1, holder, path) for path in own] for own in paths]
        self.paths = [list(own) for own in paths]
        self.grow(ranks)

    def grow(self, ranks: int) -> None:
        """See to it that there is memory for so many ranks."""
        while len(self._segments) < ranks:
            self._segments.append([Segment(1, self._holder) for _ in range(SLOTS)])
            self.paths.append([segment.path for segment in self._segments[-1]])

    @property
    def reached(self) -> int:
        """The last step that any rank has done; -1 for none."""
        return max(SnapshotBuffer(path).reached for own in self.paths for path in own)

    @property
    def newest(self) -> tuple[int, list[SnapshotBuffer]] | None:
        """The newest step of which every rank has a snapshot, and where; see `newest`."""
        return newest(self.paths)

    def trim(self) -> None:
        """Give back all memory but that of the newest snapshot. Nobody may be writing."""
        held = self.newest
        kept = set() if held is None else {slot.path for slot in held[1]}
        for segment in (segment for segments in self._segments for segment in segments):
            if segment.path not in kept:
                segment.empty()

    def close(self) -> None:
        """Let go of the memory. Twice is fine."""
        for segments in self._segments:
            for segment in segments:
                segment.close()


def newest(paths: Sequence[Sequence[str]]) -> tuple[int, list[SnapshotBuffer]] | None:
    """The newest step of which every rank has a complete snapshot, and where each rank's lies; None without one.

    Args:
        paths: The slots of each rank, on this host.
    """
    slots = [{slot.head[:3]: slot for slot in map(SnapshotBuffer, own)} for own in paths]
    complete = [
        (step, ended, ranks)
        for step, ended, ranks in (slots[0] if slots else {})
        if step != _NOTHING and 0 < ranks <= len(slots) and all((step, ended, ranks) in own for own in slots[:ranks])
    ]
    if not complete:
        return None
    latest = max(complete)
    return latest[0], [own[latest] for own in slots[: latest[2]]]


def read(slots: Sequence[SnapshotBuffer]) -> list[TensorBuffer]:
    """The images in slots."""
    return [TensorBuffer(slot.image) for slot in slots]
