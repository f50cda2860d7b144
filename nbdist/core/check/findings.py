"""Findings: what the check of a run has found, and why it ends early."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CannotBeChecked", "Findings", "NotFinite", "Refused"]


@dataclass(kw_only=True)
class Findings:
    """What the check of a run has found.

    Args:
        result: One clause: what is equal, or why nothing was checked.
        notes: Sentences for the user.
    """

    result: str = ""
    notes: list[str] = field(default_factory=list)


class CannotBeChecked(BaseException):
    """Why nothing can be checked. No `Exception`, so that it is not taken for one of the user's step.

    Args:
        why: A clause.
        noted: Whether the user gets a note; else it is in ``plan.checked`` only.
    """

    def __init__(self, why: str, *, noted: bool = True) -> None:
        super().__init__(why)
        self.noted = noted


class NotFinite(CannotBeChecked):
    """The loss or a gradient of the samples is not finite, such as where all labels of a slice are ignored."""


class Refused(BaseException):
    """Why the run is refused. See `CannotBeChecked`."""
