"""Gathers what slices give (outputs, targets) on one rank, batch by batch, in the order of the data."""

from __future__ import annotations

from typing import Any

import torch

from nbdist.core.comm import Link
from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.data.sample_rows import Rows, kept, pack_rows, rows_from_note, rows_to_note, unpack_rows
from nbdist.plan import Mesh

__all__ = ["SampleGather", "gathering_rank"]

_AHEAD = 2
"""How many batches another rank may be ahead of the gathering one, whose memory they would fill."""


def _reporting_ranks(mesh: Mesh) -> list[int]:
    """The ranks that have the outputs of their share of the data, one for each share, in the order of the shares."""
    ranks = [r for r in range(mesh.size) if mesh.coordinate(r, "pp") == mesh.pp - 1 and mesh.coordinate(r, "tp") == 0]
    return sorted(ranks, key=lambda r: (mesh.coordinate(r, "dp"), mesh.coordinate(r, "shard")))


def gathering_rank(mesh: Mesh) -> int:
    """The rank that has the outputs of the first share of the data."""
    return _reporting_ranks(mesh)[0]


class SampleGather:
    """Sends rows of samples to the gathering rank. **Collective** over the world: all ranks construct it.

    In each pass over the data every reporting rank calls `put` for its slices and `end_batch` after each batch, and all
    call `end` once. The ranks may come to different numbers of batches, as with streams.

    Args:
        world: All ranks.
        mesh: Their mesh.
        what: What is gathered, for errors.
        alike: Whether all slices give values of one structure, and the classes of those of the gathering rank.

    Attributes:
        rank: The gathering rank.
        gathers: Whether this rank is it.
        reports: Whether this rank has outputs.
    """

    def __init__(self, world: World, mesh: Mesh, what: str, *, alike: bool = True) -> None:
        ranks = _reporting_ranks(mesh)
        self.rank = ranks[0]
        self.gathers, self.reports = world.rank == self.rank, world.rank in ranks
        self._what, self._alike = what, alike
        self._links: dict[int, Link] = world.links([(self.rank, rank) for rank in ranks[1:]]) if ranks[1:] else {}
        self._others = [rank for rank in ranks[1:] if rank in self._links]
        self._own: list[Rows] = []
        self._like: Rows | None = None  # of any slice of this rank
        self._open: list[int] = list(self._others)  # ranks that have not ended this pass
        self._batches = 0

    def tell(self, word: str) -> None:
        """On the gathering rank: a word for every other reporting rank, each of which calls `hear` once. Local."""
        for rank in self._others:
            self._links[rank].send(word, [])

    def hear(self) -> str:
        """The word of the gathering rank. Waits for it."""
        word, _ = self._links[self.rank].receive()
        return str(word)

    def put(self, part: Slice, *values: Any, device: torch.device | None = None) -> None:
        """Keep a copy of what one slice gave, of its samples alone. Local.

        Args:
            part: The slice.
            *values: Nests.
            device: Where to; by default where they are.
        """
        if part.samples:
            self._own.append(Rows(part.places, tuple(kept(value, device) for value in values)))
            self._like = self._like or self._own[-1]

    def end_batch(self) -> list[Rows]:
        """Send this rank's rows of one batch; on the gathering rank, return those of all. Waits for slower ranks."""
        own, self._own = self._own, []
        if self.gathers:
            return own + self._receive()
        self._send(own, ended=False)
        self._batches += 1
        if self._batches > _AHEAD:
            self.hear()
        return []

    def end(self) -> list[list[Rows]]:
        """End this pass; on the gathering rank, return the rows of further batches, which other ranks alone had."""
        further: list[list[Rows]] = []
        if self.gathers:
            while self._open:
                further.append(self._receive())
            self._open = list(self._others)
        elif self.reports:
            self._send([], ended=True)
            for _ in range(min(self._batches, _AHEAD)):
                self.hear()
        self._batches, self._like = 0, None
        return [rows for rows in further if rows]

    def _send(self, own: list[Rows], *, ended: bool) -> None:
        notes, tensors = [], list[torch.Tensor | None]()
        for rows in own:
            note, more = pack_rows(rows, self._what) if self._alike else rows_to_note(rows, self._what)
            notes.append([note, len(more)])
            tensors += more
        self._links[self.rank].send([ended, notes], tensors)

    def _receive(self) -> list[Rows]:
        received: list[Rows] = []
        for rank in list(self._open):
            (ended, notes), tensors = self._links[rank].receive()
            for note, count in notes:
                if self._alike:
                    assert self._like is not None  # the first share of the data has rows if any has
                    received.append(unpack_rows(note, tensors[:count], self._like, self._what))
                else:
                    received.append(rows_from_note(note, tensors[:count]))
                tensors = tensors[count:]
            if ended:
                self._open.remove(rank)
            else:
                self._links[rank].send("next", [])
        return received

    def close(self) -> None:
        """Close the links. Local, twice is fine."""
        for link in self._links.values():
            link.close()
