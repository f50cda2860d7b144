"""That the losses of a batch's slices are of one form, so that their weighted mean is the loss of the batch.

A factor, and of several terms the number of elements a sample, has to be the same in all of them. Which it is nobody
can foresee, so ranks tell each other a small number made of it, which rides on the gradient sync.
"""

from __future__ import annotations

import zlib

from nbdist.core.sync.gradient_sync import ControlFlags
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
        """Forget what was. Local."""
        self._form = None

    def add(self, form: tuple[float, ...]) -> None:
        """A slice's loss is of `form`. Local.

        Raises:
            TaskError: One before was of another.
        """
        if self._form is None:
            self._form = form
        elif self._form != form:
            raise TaskError(MANY_FORMS)

    def flags(self, flags: ControlFlags, step: int) -> ControlFlags:
        """What this rank says, with the form that it has seen. Local."""
        if self._form is None:
            return flags
        # Another number in each step: what two forms have in common in one they have not in the next.
        number = 1 + zlib.crc32(repr((step, self._form)).encode()) % _NUMBERS if self._form else 0
        return flags._replace(losses=1, form=number, form_squared=number**2)


def check_one_form(agreed: ControlFlags | None) -> None:
    """Check that all ranks have seen the same, as far as it is known. Local.

    Raises:
        TaskError: They have not.
    """
    if agreed is not None and agreed.losses * agreed.form_squared != agreed.form**2:
        raise TaskError(MANY_FORMS)
