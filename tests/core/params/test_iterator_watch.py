"""Whether something was taken from an iterator."""

from __future__ import annotations

import itertools
import sys

import pytest

from nbdist.core.params.iterator_watch import IteratorWatch


class Counted:
    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return self.number


def numbers():
    while True:
        yield 1


@pytest.mark.parametrize("make", [Counted, numbers, itertools.count, lambda: itertools.cycle([1])])
def test_what_is_taken_is_seen(make):
    """By ``next()``, whether it is written in C or in Python; the hook that was there is back."""
    watched, other = make(), Counted()
    before = sys.getprofile()
    with IteratorWatch([watched]) as watch:
        sum(range(5))
        other.__next__()
    assert not watch.taken
    with IteratorWatch([watched]) as watch:
        next(watched)
    assert watch.taken
    assert sys.getprofile() is before


def test_without_iterators_nothing_is_watched():
    """Which would cost time."""
    before = sys.getprofile()
    with IteratorWatch([]) as watch:
        assert sys.getprofile() is before
        next(itertools.count())
    assert not watch.taken
