"""Checks that all slices of a batch have a loss of one form, so that their weighted mean is the loss of the batch.

Constant factors, and the ratio of counts of several terms, must be the same in all slices. They are known only after
the forward, so each rank hashes them to a small number and the gradient sync sums it.
"""

from __future__ import annotations

import zlib

from nbdist.core.sync.agreement import ControlFlags
from nbdist.errors import TaskError

__all__ = ["LossForms", "check_one_form"]

_NUMBERS = 61  # small enough that sums of squares are exact in float32
MANY_FORMS = (
    "the loss scales its means by numbers that differ from slice to slice, or adds means over numbers whose ratio "
    "differs, so slices could not be averaged exactly: return one mean and its weight, as in `return loss, mask.sum()` "
    "(a step assigns loss and weight)."
)


class LossForms:
    """The form of the losses in one step, or in one evaluation."""

    def __init__(self) -> None:
        self._form: tuple[float, ...] | None = None

    def begin(self) -> None:
        """Reset, at the start of a step or evaluation. Local."""
        self._form = None

    def add(self, form: tuple[float, ...]) -> None:
        """Add the form of a slice's loss. Local.

        Raises:
            TaskError: An earlier slice's loss has another form.
        """
        if self._form is None:
            self._form = form
        elif self._form != form:
            raise TaskError(MANY_FORMS)

    def flags(self, flags: ControlFlags, step: int) -> ControlFlags:
        """`flags` with the form of this rank's losses. Local."""
        if self._form is None:
            return flags
        # Another hash in each step: forms that collide in one step differ in the next.
        number = 1 + zlib.crc32(repr((step, self._form)).encode()) % _NUMBERS if self._form else 0
        return flags._replace(losses=1, form=number, form_squared=number**2)


def check_one_form(agreed: ControlFlags | None) -> None:
    """Check that all ranks have losses of the same form; None where the sums are not known yet. Local.

    Raises:
        TaskError: The forms differ.
    """
    if agreed is not None and agreed.losses * agreed.form_squared != agreed.form**2:
        raise TaskError(MANY_FORMS)
