"""What the check of a run says where it refuses."""

from __future__ import annotations

import pytest

from nbdist.core.check.sentences import unlike


@pytest.mark.parametrize(
    ("pair", "texts"),
    [
        ((1.5, 2.25), ("1.5", "2.25")),
        ((1.194161, 1.194164), ("1.194161", "1.194164")),
        ((1.0, 1.0 + 2**-52), ("1", "1.0000000000000002")),
        ((float("nan"), 1.0), ("nan", "1")),
        ((0.5, 0.5), ("0.5", "0.5")),
    ],
)
def test_two_numbers_have_the_digits_in_which_they_differ(pair, texts):
    """A user never reads that 1.19416 is not 1.19416."""
    assert texts == unlike(*pair)
