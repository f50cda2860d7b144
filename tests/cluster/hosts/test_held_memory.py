"""Held memory: other processes open it by path; it grows where it is written, and is gone when it is released."""

from __future__ import annotations

import os

import pytest

from nbdist.cluster.hosts.held_memory import HeldMemory
from nbdist.errors import ClusterError
from nbdist.segment_path import open_segment


@pytest.fixture
def memory():
    held = HeldMemory()
    yield held
    held.release()


def test_what_is_written_is_read_by_path(memory):
    path, other = memory.hold(2)
    assert path != other
    memory.write(path, 5, b"content")
    assert memory.read(path, 0, 100) == b"\0" * 5 + b"content"
    assert memory.read(path, 6, 3) == b"ont"
    with os.fdopen(open_segment(path), "rb") as file:
        assert file.read() == b"\0" * 5 + b"content"
    assert memory.read(other, 0, 100) == b""


def test_memory_that_another_process_holds_is_read_too(memory):
    other = HeldMemory()
    (path,) = other.hold(1)
    other.write(path, 0, b"content")
    assert memory.read(path, 3, 100) == b"tent"
    other.release()


def test_emptied_memory_keeps_its_path_and_released_memory_does_not(memory):
    (path,) = memory.hold(1)
    memory.write(path, 0, b"content")
    memory.empty([path])
    assert memory.read(path, 0, 100) == b""
    memory.write(path, 0, b"again")
    memory.release([path])
    memory.release([path])  # twice is fine
    with pytest.raises(ClusterError, match="is gone"):
        open_segment(path)
    memory.write(path, 0, b"late")
    with pytest.raises(ClusterError, match="is gone"):
        memory.read(path, 0, 100)
