"""How many engines make sense, and whether to count GPUs."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from nbdist.errors import PlanError
from nbdist.plan import available_bytes, available_cores, capacity, check_engines, default_engines, may_have_gpus


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
    """With the machine's capacity and the limit."""
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


def test_gpus_that_torch_can_use_are_not_overlooked():
    """Without a driver, torch counts none."""
    assert may_have_gpus() or not torch.cuda.device_count()


def test_a_driver_is_seen_by_its_device(tmp_path, monkeypatch):
    """One of several is enough; under Windows, without device files, there may always be GPUs."""
    device = tmp_path / "driver"
    monkeypatch.setattr(capacity, "_GPU_DEVICES", (str(tmp_path / "another"), str(device)))
    assert not may_have_gpus()
    device.touch()
    assert may_have_gpus()
    device.unlink()
    monkeypatch.setattr(sys, "platform", "win32")
    assert may_have_gpus()


def test_memory_is_bounded_by_the_host_and_by_the_container(monkeypatch):
    """The smaller of the two counts; None if neither is known."""
    assert 2**20 < available_bytes() < 2**50
    monkeypatch.setattr(capacity, "_free_in_container", lambda: 5)
    assert 5 == available_bytes()
    monkeypatch.setattr(capacity, "_free_on_host", lambda: None)
    monkeypatch.setattr(capacity, "_free_in_container", lambda: None)
    assert available_bytes() is None
