"""How many engines make sense."""

from __future__ import annotations

import os

import pytest

from nbdist.errors import PlanError
from nbdist.plan import available_cores, check_engines, default_engines


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch):
    monkeypatch.delenv("NBDIST_MAX_ENGINES", raising=False)


@pytest.mark.parametrize(
    ("cores", "gpus", "engines"), [(2, 0, 2), (1, 0, 1), (64, 0, 4), (64, 8, 8), (2, 1, 1)]
)  # fmt: skip
def test_the_default_is_an_engine_a_gpu_or_a_core_up_to_four(cores, gpus, engines):
    """And it is one that passes the check."""
    assert engines == default_engines(cores, gpus)
    check_engines(engines, cores, gpus)


@pytest.mark.parametrize(
    ("engines", "message"),
    [
        (0, r"0 engines is too few: use 1 or more\."),
        (-2, "-2 engines is too few"),
        (9, r"9 engines are more than this machine .* \(2 cores, 0 GPUs\): use 8 or fewer\."),
        (2.0, r"engines must be a whole number, not 2\.0"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused(engines, message):
    """With what the machine has and what can be used."""
    with pytest.raises(PlanError, match=message):
        check_engines(engines, 2, 0)


def test_the_limit_can_be_set(monkeypatch):
    """``$NBDIST_MAX_ENGINES`` limits the default too."""
    monkeypatch.setenv("NBDIST_MAX_ENGINES", "3")
    check_engines(3, 1, 0)
    with pytest.raises(PlanError, match="use 3 or fewer"):
        check_engines(4, 64, 0)
    assert 3 == default_engines(64, 0)


def test_cores_are_those_this_process_may_use():
    """At least one, and no more than the host has."""
    assert 1 <= available_cores() <= os.cpu_count()
