"""Where a process stands, as it tells by itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from nbdist.cluster.cells.cell_run import until_next_look


@pytest.mark.engines
def test_what_a_process_tells_takes_no_more_room_the_more_often_it_is_asked(cluster):
    """Its file holds the newest answer."""
    files = [Path(engine.stacks) for engine in cluster.engines]
    sizes = []
    for _ in range(4):
        assert ["idle", "idle"] == [rank.state for rank in cluster.where().ranks]
        sizes.append(max(file.stat().st_size for file in files))
    assert max(sizes) < 2 * min(sizes)


def test_a_long_cell_is_looked_at_less_and_less_often():
    """At first every few seconds, then once a minute; and soon again where it seems to hang."""
    looks = list(itertools.accumulate(range(6), lambda last, _: until_next_look(last, hopeless=False), initial=3.0))
    assert [3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0] == looks
    assert 3.0 == until_next_look(60.0, hopeless=True)
