"""Spare engines replace lost ones."""

from __future__ import annotations

import os
import signal
import threading

import psutil
import pytest
from shared_cluster import ENGINES, HUNG_S, until

import nbdist
from nbdist.cluster.calls.pending_call import EngineDied
from nbdist.cluster.engines.starting import start_engines
from nbdist.cluster.hosts.host_choice import LOCAL, HostChoice
from nbdist.cluster.launch.launcher import Launch
from nbdist.errors import EngineError, PlanError


@pytest.fixture
def with_spare(cluster):
    """The running cluster, and its one spare, ready."""
    cluster.start()
    until(lambda: len(cluster.spare_engines) == cluster.spares == 1)
    return cluster


@pytest.fixture
def engines(shared_cluster):
    """Two engines of the test's own, without spares."""
    engines = start_engines(HostChoice(engines={LOCAL: 2}), "cpu", HUNG_S, lambda words: None)
    yield engines
    engines.end()


def pids(cluster):
    return [engine.pid for engine in cluster.engines]


def replace(cluster, *ranks):
    """Kill ranks, and let the cluster replace them."""
    for rank in ranks:
        os.kill(pids(cluster)[rank], signal.SIGKILL)
    until(lambda: [cluster.engines[rank].state for rank in ranks] == ["lost"] * len(ranks))
    cluster.start()


def test_a_spare_takes_the_place_of_a_lost_engine(with_spare):
    """The other rank keeps its engine, all form a new world, and another spare is started."""
    (spare,), before = with_spare.spare_engines, pids(with_spare)
    replace(with_spare, 0)
    assert [spare.pid, before[1]] == pids(with_spare)
    cell = with_spare.execute("import os, torch.distributed as d; print(os.getpid(), rank, d.get_rank(), world_size)")
    cell.wait()
    assert {r: f"{pid} {r} {r} 2\n" for r, pid in enumerate(pids(with_spare))} == cell.printed()
    (follower,) = until(lambda: with_spare.spare_engines)
    assert follower.pid not in [*before, spare.pid]


def test_more_engines_are_lost_than_there_are_spares(with_spare):
    """The spare takes one rank, a new engine the other."""
    (spare,), before = with_spare.spare_engines, pids(with_spare)
    replace(with_spare, 0, 1)
    assert spare.pid in pids(with_spare)
    assert not set(before) & set(pids(with_spare))


def test_a_spare_is_no_rank(with_spare):
    """No record, cell or pushed value is for it; it is idle, on this host, with rank -1."""
    (spare,) = with_spare.spare_engines
    assert (-1, "idle") == (spare.rank, spare.state)
    assert psutil.Process(spare.pid).ppid() == psutil.Process(pids(with_spare)[0]).ppid()
    assert [0, 1] == [engine.rank for engine in with_spare.engines]
    assert "Cluster(engines=2), running on cpu, cpu" == repr(with_spare)
    with_spare.push(value=1)
    cell = with_spare.execute("print(value)")
    cell.wait()
    assert {0: "1\n", 1: "1\n"} == cell.printed()


def test_a_spare_that_died_is_replaced_by_the_next_start(with_spare):
    """Until then it is missing in the list; the ranks are unaffected."""
    (spare,), before = with_spare.spare_engines, pids(with_spare)
    os.kill(spare.pid, signal.SIGKILL)
    until(lambda: not with_spare.spare_engines)
    with_spare.check_ready()
    with_spare.start()
    assert [spare.pid] != [engine.pid for engine in until(lambda: with_spare.spare_engines)]
    assert before == pids(with_spare)


def test_a_spare_that_ends_while_it_starts_is_replaced(with_spare, monkeypatch):
    """Without another start."""
    (spare,), ended, add = with_spare.spare_engines, [], Launch.add

    def add_and_kill(launch, *arguments):
        added = add(launch, *arguments)
        if not ended:
            ended.extend(int(mark.partition(":")[0]) for _, mark in added)
            os.kill(ended[0], signal.SIGKILL)
        return added

    monkeypatch.setattr(Launch, "add", add_and_kill)
    os.kill(spare.pid, signal.SIGKILL)
    until(lambda: not with_spare.spare_engines)
    with_spare.start()
    (follower,) = until(lambda: with_spare.spare_engines)
    assert follower.pid not in (spare.pid, *ended)
    assert len(ended) == 1


def test_the_number_of_spares_can_be_changed(with_spare):
    """Missing ones are started, surplus ones ended."""
    before = pids(with_spare)
    with_spare.spares = 2
    with_spare.start()
    both = until(lambda: len(with_spare.spare_engines) == 2 and with_spare.spare_engines)
    with_spare.spares = 0
    with_spare.start()
    until(lambda: not with_spare.spare_engines and not any(psutil.pid_exists(spare.pid) for spare in both))
    assert before == pids(with_spare)
    with_spare.spares = 1
    with_spare.start()


@pytest.mark.parametrize("spares", [-1, 1.5, "two", True])
def test_a_number_of_spares_that_is_not_possible_is_refused(spares):
    """The error names the number and what to use."""
    with pytest.raises(PlanError, match=f"{spares!r} spares are not possible: use a whole number, 0 or more"):
        nbdist.Cluster(1, device="cpu", spares=spares)


def test_one_spare_by_default_where_engines_are_forked(monkeypatch):
    """And none where each would need a torch of its own."""
    assert 1 == nbdist.Cluster(1, device="cpu").spares
    monkeypatch.setenv("NBDIST_FORK", "off")
    assert 0 == nbdist.Cluster(1, device="cpu").spares


def test_a_lost_rank_is_known_and_replaced_from_any_thread(engines):
    """Also without spares; a new call is refused, a running one fails."""
    sleeping = engines.start_cell(1, "import time; time.sleep(3600)")
    os.kill(engines.records()[1].pid, signal.SIGKILL)
    until(lambda: [1] == engines.lost)
    assert isinstance(until(lambda: sleeping.done() and sleeping.exception()), EngineDied)
    with pytest.raises(EngineError, match="rank 1: the engine's process has ended"):
        engines.start_call(1, "ping")
    replaced = []
    thread = threading.Thread(target=lambda: replaced.extend(engines.replace_lost()))
    thread.start()
    thread.join()
    assert [1] == replaced
    assert (False, []) == (engines.formed, engines.lost)
    engines.form()
    assert {e.rank: e.pid for e in engines.records()} == engines.call(range(ENGINES), "ping")


def test_a_rank_that_does_not_react_can_be_killed(engines):
    """It is lost when `kill` returns; killing a dead rank does nothing."""
    os.kill(engines.records()[0].pid, signal.SIGSTOP)
    engines.kill([0])
    engines.kill([0])
    assert [0] == engines.lost
    assert [0] == engines.replace_lost()
    engines.form()
