"""Stack dumps of running processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nbdist.cluster.cells.cell_run import until_next_check


@pytest.mark.engines
def test_the_dump_file_does_not_grow(cluster):
    """It holds only the newest dump."""
    files = [Path(engine.stacks) for engine in cluster.engines]
    sizes = []
    for _ in range(4):
        assert ["idle", "idle"] == [rank.state for rank in cluster.where().ranks]
        sizes.append(max(file.stat().st_size for file in files))
    assert max(sizes) < 2 * min(sizes)


DUMPED_AFTER_A_FAILED_CALL = """
import ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
ctypes.set_errno(11)
getattr(libc, "raise")(signal.SIGUSR1)
assert 11 == ctypes.get_errno()
"""


@pytest.mark.engines
def test_a_dump_does_not_change_why_a_system_call_failed(cluster):
    """Else a run that was looked at ended now and then: "another rank is gone ([Errno 0] Error)"."""
    cluster.execute(DUMPED_AFTER_A_FAILED_CALL).wait()


def test_a_long_cell_is_checked_less_and_less_often():
    """At first every few seconds, then once a minute; and soon again if it seems deadlocked."""
    looks = list(itertools.accumulate(range(6), lambda last, _: until_next_check(last, deadlocked=False), initial=3.0))
    assert [3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0] == looks
    assert 3.0 == until_next_check(60.0, deadlocked=True)
