"""Orders: what a user asks of a training while it goes on."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["KINDS", "Command", "Commands"]

KINDS = ("stop", "pause", "resume", "checkpoint", "lr", "scale")


class Command(NamedTuple):
    """One thing that is asked for.

    Args:
        kind: One of `KINDS`.
        value: The new learning rate of the first parameter group for "lr", the folder for "checkpoint",
            how many ranks there are to be for "scale".
        step: Steps that were done when it was carried out, where that has been done before; else None.
    """

    kind: str
    value: float | str | None = None
    step: int | None = None


class Commands:
    """The orders to one run, in the order in which they were given; this one has none.

    Rank 0 reads them. Whoever keeps them remembers after which step each was carried out, so that a training that goes
    on from a snapshot does the same again at the same place.
    """

    def new(self) -> list[Command]:
        """Those that were given since the last call. Asked before each step: it has to be cheap."""
        return []

    def stamp(self, number: int, step: int) -> None:
        """Remember that the order with this number, counted from 0, is carried out after `step` steps."""
