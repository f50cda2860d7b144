"""Classes by value arrive whole; a new version of cloudpickle that changes their form fails here, with the place."""

from __future__ import annotations

import enum
import io

import cloudpickle
import pytest
from cloudpickle.cloudpickle import CloudPickler

from nbdist.upstream import cloudpickle_private as private
from nbdist.upstream.ipython_private import class_mark


def local_class():
    class Local:
        __slots__ = ("__own", "open")

    return Local


def local_enum():
    class Local(enum.Enum):
        ONE = 1

    return Local


def test_this_version_was_tested():
    """After an upgrade: read DECISIONS.md, "Private APIs", run all tests with it, and add it to VERIFIED."""
    assert cloudpickle.__version__ in private.VERIFIED


@pytest.mark.parametrize("make", [local_class, local_enum])
def test_the_form_of_a_class_is_known(make):
    """What `tests/core/transfer/test_round_trip.py` sends arrives by this."""
    kind = make()
    reduced = CloudPickler.reducer_override(CloudPickler(io.BytesIO()), kind)
    assert private.is_class_by_value(reduced)
    made = private.reduced_class(kind, reduced)
    assert kind is made[0](*made[1])
    assert kind is private.class_of_mark(class_mark(kind))


def test_an_unknown_form_is_left_alone():
    """cloudpickle's own way is used then."""
    for reduced in (NotImplemented, (print, ()), (print, (1,) * 6, ({}, {}), None, None, print)):
        assert not private.is_class_by_value(reduced)
