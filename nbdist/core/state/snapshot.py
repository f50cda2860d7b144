"""Snapshots: the state of a training in shared memory that outlives its ranks.

The process that starts the ranks creates and holds the memory; each rank writes its share, alternately into two
buffers. A buffer is marked with its step only when complete, so a rank may be killed at any moment. No rank is more
than a step ahead of another, so every rank still has the newest snapshot that all ranks have completed. Where ranks
hold replicas, those of one that is left save all of it after an error: then no step is repeated.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from nbdist.core.state.tensor_buffer import TensorBuffer, TensorLayout
from nbdist.core.transfer.payload import Holder, Segment
from nbdist.segment_path import open_segment

__all__ = [
    "BUFFERS_PER_RANK", "HEAD_BYTES", "Head", "RankSnapshots", "SnapshotBuffer", "SnapshotStore", "newest",
    "newest_whole", "read",
]  # fmt: skip

BUFFERS_PER_RANK = 3
"""Two used alternately, and a third while one of them is being written to disk."""
_STEP = struct.Struct("<q")  # one aligned word: a reader sees the old or the new value, never half of one
_HEAD = struct.Struct("<qqqqqq")
_LAST_STEP = slice(64, 64 + _STEP.size)  # behind the header
HEAD_BYTES = 4096
"""Where the content of a buffer begins."""
_NO_STEP = -1


class Head(NamedTuple):
    """The header of a snapshot buffer.

    Args:
        step: Completed steps; -1 if the buffer holds no snapshot.
        ended: Completed epochs and rows, which distinguish snapshots of the same step.
        ranks: How many ranks write this snapshot.
        nbytes: Length of its tensor buffer.
        replica: Number of the replica of which this is a share, if that can be resumed from alone, from 1; else 0.
        members: How many ranks have a share of that replica.
    """

    step: int
    ended: int
    ranks: int
    nbytes: int
    replica: int = 0
    members: int = 0

    @staticmethod
    def nbytes_read() -> int:
        """How many bytes at the beginning of a buffer `parse` reads."""
        return _LAST_STEP.stop

    @classmethod
    def parse(cls, data: bytes) -> tuple[Head, int]:
        """The header of a buffer that begins with these bytes, and the last step that was recorded there."""
        if len(data) < cls.nbytes_read():
            return _EMPTY, _NO_STEP
        head = cls._make(_HEAD.unpack_from(data))
        head = head if head.ranks else _EMPTY  # nothing was written yet
        return head, max(head.step, _STEP.unpack(data[_LAST_STEP])[0] - 1)

    def packed(self) -> bytes:
        """As a buffer has it."""
        return _HEAD.pack(*self)

    @staticmethod
    def none() -> bytes:
        """What a buffer without a snapshot begins with."""
        return _STEP.pack(_NO_STEP)


_EMPTY = Head(_NO_STEP, 0, 0, 0)


class SnapshotBuffer:
    """Shared memory for one snapshot of one rank.

    Args:
        path: Of a shared-memory segment that another process holds; it grows as needed.
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
        """Its header."""
        if self._memory is None and not self._map(0):
            return _EMPTY
        return Head._make(_HEAD.unpack(self._memory[: _HEAD.size]))

    @property
    def content(self) -> torch.Tensor:
        """``(bytes,)`` of uint8: the snapshot, laid out as a `TensorBuffer`."""
        return self._bytes[HEAD_BYTES : HEAD_BYTES + self.head.nbytes]

    def write(
        self, moment: tuple[int, int], ranks: int, layout: TensorLayout, tensors: Mapping[str, torch.Tensor], text: str,
        replica: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        """Write a snapshot; until it is complete the buffer holds none. Local.

        Args:
            moment: See `TrainProgress.moment`.
            ranks: How many ranks write this snapshot.
            layout: Of `tensors`.
            tensors: The tensors to save.
            text: JSON of everything else.
            replica: See `Head`: its number, and how many ranks have a share of it.
        """
        header = layout.header(text)
        nbytes = len(header) + layout.data_bytes
        self._map(HEAD_BYTES + nbytes)
        self._memory[: _STEP.size] = _STEP.pack(_NO_STEP)
        start = HEAD_BYTES + len(header)
        self._memory[HEAD_BYTES:start] = header
        if self._layout is not layout or self._start != start:
            self._layout, self._start = layout, start
            places = [layout.places[key] for key in tensors]
            flats = [self._bytes[start + first : start + first + length] for first, length in places]
            self._views = [f.view(t.dtype).view(t.shape) for f, t in zip(flats, tensors.values(), strict=True)]
        if self._views:
            torch._foreach_copy_(self._views, list(tensors.values()))
        head = _HEAD.pack(*moment, ranks, nbytes, *replica)  # the step is written last: it makes the snapshot valid
        self._memory[_STEP.size : _HEAD.size] = head[_STEP.size :]
        self._memory[: _STEP.size] = head[: _STEP.size]

    def fill(self, head: Head, content: bytes) -> None:
        """Copy a snapshot that a rank has written elsewhere; until it is complete the buffer holds none. Local."""
        self._map(HEAD_BYTES + head.nbytes)
        self._memory[: _STEP.size] = Head.none()
        self._memory[HEAD_BYTES : HEAD_BYTES + head.nbytes] = content
        self._memory[_STEP.size : _HEAD.size] = head.packed()[_STEP.size :]
        self._memory[: _STEP.size] = head.packed()[: _STEP.size]

    @property
    def last_step(self) -> int:
        """The last step that was recorded here or is in the snapshot; -1 for none."""
        head = self.head
        recorded = 0 if self._memory is None else _STEP.unpack(self._memory[_LAST_STEP])[0]
        return max(head.step, recorded - 1)

    def record_step(self, step: int) -> None:
        """Record that a step is complete, with or without a snapshot. Local; a fraction of a microsecond."""
        if not self._bytes.numel():
            self._map(HEAD_BYTES)
            if not self.head.ranks:
                self._memory[: _STEP.size] = _STEP.pack(_NO_STEP)
        self._memory[_LAST_STEP] = _STEP.pack(step + 1)

    def _map(self, nbytes: int) -> bool:
        """Map the segment, enlarged to `nbytes` if it is smaller; returns False if it is empty."""
        if self._memory is not None and len(self._memory) >= nbytes:
            return True
        with os.fdopen(open_segment(self.path), "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if size < nbytes:
                size = nbytes + nbytes // 8
                os.ftruncate(file.fileno(), size)
            if size < HEAD_BYTES:
                return False
            self._memory = mmap.mmap(file.fileno(), size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._layout = None
        return True


class RankSnapshots:
    """The snapshot buffers of one rank; no other rank writes them.

    Args:
        paths: Of `BUFFERS_PER_RANK` segments.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._buffers = [SnapshotBuffer(path) for path in paths]

    def write(
        self, moment: tuple[int, int], ranks: int, layout: TensorLayout, tensors: Mapping[str, torch.Tensor], text: str,
        replica: tuple[int, int] = (0, 0),
    ) -> SnapshotBuffer:  # fmt: skip
        """Write a snapshot over the older of two, or over that of the same moment; returns its buffer.

        A rank may save the same moment twice (an error just after a snapshot) while others have not saved it yet, so
        the snapshot before it must stay.
        """
        free = [buffer for buffer in self._buffers if not buffer.pinned]
        again = [buffer for buffer in free if buffer.head[:2] == moment]
        buffer = again[0] if again else min(free[:2], key=lambda buffer: buffer.head[:2])
        buffer.write(moment, ranks, layout, tensors, text, replica)
        return buffer

    def record_step(self, step: int) -> None:
        """Record that a step is complete; see `SnapshotStore.last_step`. Local."""
        self._buffers[0].record_step(step)

    def use_one_buffer(self) -> None:
        """From now on use one buffer, for checkpoints only, which pass through memory. Local, before any write.

        While a checkpoint is being written there is no snapshot.
        """
        del self._buffers[1:]


class SnapshotStore:
    """The snapshot buffers of all ranks, created on their host by the process that starts them, and freed with this.

    Args:
        ranks: How many.
        holder: The process that also holds the memory, see `Segment`.
        paths: Existing segments of an earlier process; by default new ones.
    """

    def __init__(self, ranks: int, holder: Holder | None = None, paths: Sequence[Sequence[str]] = ()) -> None:
        self._holder = holder
        self._trimming = threading.Lock()  # memory that is freed while another thread reads it would be a bus error
        self._segments = [[Segment(1, holder, path) for path in own] for own in paths]
        self.paths = [list(own) for own in paths]
        self.grow(ranks)

    def grow(self, ranks: int) -> None:
        """Create buffers for up to so many ranks."""
        while len(self._segments) < ranks:
            self._segments.append([Segment(1, self._holder) for _ in range(BUFFERS_PER_RANK)])
            self.paths.append([segment.path for segment in self._segments[-1]])

    @property
    def last_step(self) -> int:
        """The last step that any rank has completed; -1 for none."""
        with self._trimming:
            return max(SnapshotBuffer(path).last_step for own in self.paths for path in own)

    @property
    def newest(self) -> tuple[int, dict[int, SnapshotBuffer]] | None:
        """The step of the newest whole snapshot, and its buffers; see `newest`."""
        return newest(self.paths)

    @property
    def elsewhere(self) -> dict[str, list[list[str]]]:
        """Each rank's buffers on other hosts, by their names, for another kernel."""
        return {}

    def paths_on(self, host: Any) -> list[list[str]]:
        """Each rank's buffers for ranks of a host: where they write, and read what they resume from."""
        return self.paths

    def refresh(self) -> None:
        """Make sure that `paths` have the newest snapshot that can be had."""

    def distribute(self) -> None:
        """Make sure that ranks of all hosts can read the newest snapshot. No rank may be writing."""

    def trim(self) -> None:
        """Free all memory but that of the newest snapshot. No rank may be writing."""
        with self._trimming:
            found = self.newest
            needed = set() if found is None else {buffer.path for buffer in found[1].values()}
            for segment in (segment for segments in self._segments for segment in segments):
                if segment.path not in needed:
                    segment.empty()

    def close(self) -> None:
        """Free the memory. Twice is fine."""
        for segments in self._segments:
            for segment in segments:
                segment.close()


def newest(paths: Sequence[Sequence[str]]) -> tuple[int, dict[int, SnapshotBuffer]] | None:
    """The step of the newest whole snapshot, and the buffers of the ranks that it needs; None without one.

    Args:
        paths: The buffers of each rank, on this host.
    """
    buffers = {rank: {buffer.head: buffer for buffer in map(SnapshotBuffer, own)} for rank, own in enumerate(paths)}
    found = newest_whole(buffers)
    if not found:
        return None
    return next(iter(found.values())).step, {rank: buffers[rank][head] for rank, head in found.items()}


def newest_whole(heads: Mapping[int, Collection[Head]]) -> dict[int, Head]:
    """The header of each rank that the newest whole snapshot needs; empty without one.

    A snapshot is whole with all ranks that wrote it, or with all of one replica that can be resumed from alone.

    Args:
        heads: The headers of each rank whose buffers are left.
    """
    written: dict[tuple[int, int, int], dict[int, Head]] = {}
    for rank, own in heads.items():
        for head in own:
            if head.step != _NO_STEP and head.ranks:
                written.setdefault(head[:3], {})[rank] = head
    for moment in sorted(written, reverse=True):
        by_rank = written[moment]
        every = range(moment[2])
        if all(rank in by_rank for rank in every):
            return {rank: by_rank[rank] for rank in every}
        for number in sorted({head.replica for head in by_rank.values()} - {0}):
            share = {rank: head for rank, head in sorted(by_rank.items()) if head.replica == number}
            if len(share) == next(iter(share.values())).members:
                return share
    return {}


def read(buffers: Mapping[int, SnapshotBuffer]) -> list[TensorBuffer]:
    """The tensors in the snapshot buffers of ranks."""
    return [TensorBuffer(buffer.content) for buffer in buffers.values()]
