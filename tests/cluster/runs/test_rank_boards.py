"""Boards of ranks: what is large is kept until it has been read, however often small states follow."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import pytest
from shared_cluster import until

from nbdist.cluster.hosts.host import HostFacts
from nbdist.cluster.hosts.local_host import LocalHost
from nbdist.cluster.runs.rank_boards import RankBoards
from nbdist.telemetry import Point, Progress, RankState

CURVES = {"loss": (Point(1, 1, 2.0, 2.0, 2.0),), "kl": (Point(1, 1, 0.5, 0.5, 0.5),)}
FIRST = Progress(rank=0, step=1, epoch=1, samples=4, loss=2.0, samples_per_s=1.0, memory_mib=1.0, curves=CURVES)


@pytest.mark.parametrize("here", [True, False])
def test_curves_outlive_the_small_states_after_them(here, tmp_path, monkeypatch):
    """The first state is a whole one; small ones follow before the notebook reads: both are read, in that order."""
    monkeypatch.setattr(LocalHost, "here", here)
    host = LocalHost(HostFacts(name="a host", host_id="1", cores=1), tmp_path, "")
    engines = types.SimpleNamespace(size=2, anchor=None, host_id="1", placed=lambda: {0: host, 1: None})
    with contextlib.closing(RankBoards(engines)) as boards:
        sink = boards.publisher.sink(0)
        for step in range(1, 6):
            sink.emit(dataclasses.replace(FIRST, step=step, curves=CURVES if step == 1 else {}))
        whole, *small = until(lambda: boards.read(0))
        state = RankState.from_dict(whole)
        for one in small:
            assert not RankState.is_whole(one)
            state = RankState.from_dict(one, state)
        assert CURVES == state.curves
        assert [] == boards.read(1) == boards.read(0)
