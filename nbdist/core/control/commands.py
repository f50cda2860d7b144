"""Commands that a user sends to a running training, such as stop or pause."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Command", "Commands"]


class Command(NamedTuple):
    """One command.

    Args:
        kind: One of `COMMANDS`, a table in `telemetry`.
        value: What it takes: a learning rate of the first parameter group, a folder, a number of ranks; or None.
        step: The stamp: completed steps when it was applied; None if it has not been applied yet.
    """

    kind: str
    value: float | str | None = None
    step: int | None = None


class Commands:
    """The commands to one run, in the sequence in which they were sent; this base class has none.

    Rank 0 reads them and stamps each with the step after which it was applied, so that a training that resumes from a
    snapshot applies it again after the same step.
    """

    def new(self) -> list[Command]:
        """Commands since the last call. Called before each step, so it must be cheap."""
        return []

    def stamp(self, number: int, step: int) -> None:
        """Record that the command with this number, counted from 0, is applied after `step` steps."""
