"""Boards of ranks: what is large is kept until it has been read, however often small states follow."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types

import pytest
from shared_cluster import until

from nbdist.cluster.hosts.host import HostFacts
from nbdist.cluster.hosts.local_host import LocalHost
from nbdist.cluster.runs import rank_boards
from nbdist.cluster.runs.rank_boards import RANKS_A_LOOK, RankBoards
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
        whole, *small = until(lambda: boards.read().get(0))
        state = RankState.from_dict(whole)
        for one in small:
            assert not RankState.is_whole(one)
            state = RankState.from_dict(one, state)
        assert CURVES == state.curves
        assert not any(new for _ in range(3) for new in boards.read().values())


@pytest.mark.parametrize("hosts", [0, 10])
def test_of_many_ranks_a_look_is_at_some_in_turn(hosts, tmp_path, monkeypatch):
    """Rank 0 is among them each time; all are looked at soon. Ranks of one host come together."""
    count = 3 * (RANKS_A_LOOK - 1) + 1 if not hosts else 100
    there = [LocalHost(HostFacts(name=f"h{n}", host_id=str(n), cores=1), tmp_path / str(n), "") for n in range(hosts)]
    for host in there:
        monkeypatch.setattr(host, "here", False, raising=False)
    placed = {rank: there[rank * hosts // count] if hosts else None for rank in range(count)}
    engines = types.SimpleNamespace(size=count, anchor=None, host_id="head", placed=lambda: placed)
    monkeypatch.setattr(rank_boards, "_INTERVAL_S", 0.0)
    with contextlib.closing(RankBoards(engines)) as boards:
        for rank in range(count):
            boards.publisher.sink(rank).emit(dataclasses.replace(FIRST, rank=rank))
        seen = set()
        for _ in range(8):
            found = boards.read()
            assert 0 in found
            assert len(found) <= RANKS_A_LOOK + 10
            seen |= {rank for rank, new in found.items() if new}
        assert seen == {*range(count)}


def test_looks_that_follow_closely_are_at_rank_0(monkeypatch):
    """The others have published nothing since."""
    count = 2 * RANKS_A_LOOK
    engines = types.SimpleNamespace(size=count, anchor=None, host_id="head", placed=lambda: dict.fromkeys(range(count)))
    monkeypatch.setattr(rank_boards, "_INTERVAL_S", math.inf)
    with contextlib.closing(RankBoards(engines)) as boards:
        assert RANKS_A_LOOK == len(boards.read())
        assert {0} == {*boards.read()}
