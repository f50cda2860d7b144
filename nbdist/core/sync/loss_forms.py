"""Checks that all slices of a batch have a loss of one form, so that their weighted mean is the loss of the batch.

Constant factors, and the ratio of counts of several terms, must be the same in all slices. They are known only after
the forward, so each rank hashes them to a small number and the gradient sync sums it.

A factor that is a count makes a sum of a mean. One that equals a count of some slice, as the 2 of ``a + 2 * b`` does in
a slice of two samples, is none if a slice of another size has it too, now or in an earlier step.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import Protocol

from nbdist.core.sync.agreement import ControlFlags
from nbdist.errors import TaskError

__all__ = ["LossForms", "check_one_form"]

_NUMBERS = 61  # small enough that sums of squares are exact in float32
MANY_FORMS = (
    "the loss scales its means by numbers that differ from slice to slice, or adds means over numbers whose ratio "
    "differs, so slices could not be averaged exactly: return one mean and its weight, as in `return loss, mask.sum()` "
    "(a step assigns loss and weight)."
)


class Mean(Protocol):
    """What is known of a slice's loss; see `loss_weight.Mean`."""

    @property
    def form(self) -> tuple[float, ...]:
        """What must be the same in every slice."""

    @property
    def factors(self) -> tuple[float, ...]:
        """Those of its terms."""

    @property
    def numbers(self) -> frozenset[float]:
        """Whole numbers in it."""

    @property
    def counts(self) -> frozenset[float]:
        """Those of them that may be counts."""


class LossForms:
    """The form of the losses in one step, or in one evaluation."""

    def __init__(self) -> None:
        self._form: tuple[float, ...] | None = None
        self._constants: dict[tuple[float, ...], frozenset[float]] = {}  # by factors: numbers that are no counts
        self._counts: dict[tuple[float, ...], frozenset[float]] = {}  # by factors: numbers that may be, in this step
        self._refusal = ""
        self._trusted = False

    def trust(self) -> None:
        """Take it that no factor is a count: a check, or steps before, have shown it. Local."""
        self._trusted = True

    def begin(self) -> None:
        """Reset, at the start of a step or evaluation. Local."""
        self._form, self._counts = None, {}

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Context of another step, of which this one knows nothing. Local."""
        saved = self._form, self._counts
        self.begin()
        try:
            yield
        finally:
            self._form, self._counts = saved

    def add(self, mean: Mean, refusal: str) -> None:
        """Add the form of a slice's loss. Local.

        Args:
            mean: How it is averaged.
            refusal: What to say if it is a sum.

        Raises:
            TaskError: An earlier slice's loss has another form.
        """
        if self._form is None:
            self._form = mean.form
        elif self._form != mean.form:
            raise TaskError(refusal if mean.counts or any(self._counts.values()) else MANY_FORMS)
        # Whole factors alone: a weight that changes from step to step must not make an entry in each.
        key = tuple(factor for factor in mean.factors if float(factor).is_integer())
        for numbers, more in ((self._constants, mean.numbers - mean.counts), (self._counts, mean.counts)):
            numbers[key] = numbers.get(key, frozenset()) | more
        self._refusal = refusal

    def check_no_sum(self) -> None:
        """Check that no factor is a count, after the slices of a step. Local.

        Raises:
            TaskError: One may be.
        """
        if not self._trusted and any(counts - self._constants[key] for key, counts in self._counts.items()):
            raise TaskError(self._refusal)

    def flags(self, flags: ControlFlags, step: int) -> ControlFlags:
        """`flags` with the form of this rank's losses. Local.

        Raises:
            TaskError: A loss may be a sum.
        """
        self.check_no_sum()
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
