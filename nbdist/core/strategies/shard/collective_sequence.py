"""The sequence of collectives that the ranks of an axis run for blocks, though each rank may need others.

A model may branch by its data: a rank needs blocks that another does not, or in another order, or another number of
times. In the first step ranks compare before each collective what each needs (a message), and run all of that; then
they follow the sequence of that step, without a message. A rank that needs something later in it first takes part in
all that comes before, for the others; what is left when it ends is compared again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from nbdist.core.comm import Channel

__all__ = ["GATHER", "REDUCE", "CollectiveSequence", "Need"]

GATHER = 0
"""A kind of collective. Of what ranks need at the same time gathers come first: who waits in a gather is not done."""
REDUCE = 1
"""The other kind."""
_END = 2

T = TypeVar("T")


class Need(NamedTuple):
    """A collective of a block.

    Args:
        kind: `GATHER` or `REDUCE`.
        number: The block.
    """

    kind: int
    number: int


class CollectiveSequence:
    """Runs collectives of blocks such that those of all ranks match; see the module.

    Args:
        channel: The axis.
        serve: Takes part in a collective for other ranks, with nothing of this rank's own. **Collective**.
    """

    def __init__(self, channel: Channel, serve: Callable[[Need], None]) -> None:
        self._channel = channel
        self._serve = serve
        self._sequences: dict[str, list[Need]] = {}
        self._phase = ""
        self._sequence: list[Need] = []
        self._next = 0
        self._run: list[Need] = []
        self._compared = False

    def begin(self, phase: str) -> None:
        """Begin a phase, which has a sequence of its own. Local, the same on all ranks."""
        self._phase = phase
        self._sequence = self._sequences.get(phase, [])
        self._next, self._run, self._compared = 0, [], False

    def run(self, need: Need, collective: Callable[[], T]) -> T:
        """Run a collective when it is its turn. **Collective**."""
        if self._come_to(need):
            return collective()
        while True:
            found: list[T] = []
            for turn in self._compare(need):
                self._run.append(turn)
                if turn == need:
                    found.append(collective())
                else:
                    self._serve(turn)
            self._compared = True
            if found:
                return found[0]

    def settle(self) -> None:
        """Return when no rank needs a collective of what it has computed so far. **Collective**."""
        self._come_to(_NOTHING)
        while turns := self._compare(_NOTHING):
            for turn in turns:
                self._run.append(turn)
                self._serve(turn)
            self._compared = True

    def end(self) -> None:
        """End the phase: `settle`, and keep the sequence. **Collective**."""
        self.settle()
        if self._compared:  # what is compared behind a sequence would lengthen it: begin anew
            self._sequences[self._phase] = [] if self._sequence else self._run

    def _come_to(self, need: Need) -> bool:
        """Take part in what comes before `need` in the sequence; returns whether it has it."""
        while self._next < len(self._sequence):
            turn = self._sequence[self._next]
            self._next += 1
            if turn == need:
                return True
            self._serve(turn)
        return False

    def _compare(self, need: Need) -> list[Need]:
        """What is to be run now, in order; empty if no rank needs anything. **Collective**."""
        gathered = self._channel.all_gather(torch.tensor(need, device=self._channel.device))
        needs = {Need(*numbers) for numbers in torch.stack(gathered).tolist()}
        kind = min(other.kind for other in needs)
        return sorted(other for other in needs if other.kind == kind and kind != _END)


_NOTHING = Need(_END, 0)
