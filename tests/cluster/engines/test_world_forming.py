"""Worlds are formed repeatedly in the same processes, while ranks are killed, stopped or interrupted."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading

import psutil
import pytest
from shared_cluster import HUNG_S, until

from nbdist.cluster.engines import world_forming
from nbdist.cluster.engines.starting import start_engines
from nbdist.cluster.engines.world_forming import Forming
from nbdist.cluster.hosts.host_choice import LOCAL, HostChoice
from nbdist.errors import ClusterError, EngineError

KILLS = 8
GENERATIONS, WARM_UP = 100, 20
MIB = 2**20
STOPPED: set[int] = set()  # processes that `stop` has stopped
SPARE = {"shared_memory": 1, "process_group": 0}


@pytest.fixture(params=["shared_memory", "process_group"])
def three(request, shared_cluster, monkeypatch):
    """Three engines of the test's own that talk through either kind of channel."""
    monkeypatch.setenv("NBDIST_CHANNEL", request.param)
    engines = start_engines(HostChoice(engines={LOCAL: 3}), "cpu", HUNG_S, lambda words: None, SPARE[request.param])
    abort = Forming.abort

    def patiently(forming):
        """Wait until ranks are released, however slow the machine; stopped ranks never are."""
        forming.release()
        calls = forming.calls.items()
        until(lambda: engines.check_alive() or all(call.done() or stopped(engines, rank) for rank, call in calls))
        abort(forming)

    monkeypatch.setattr(Forming, "abort", patiently)
    monkeypatch.setattr(world_forming, "_RELEASED_WITHIN_S", 0.0)  # all that can be released are
    yield engines
    engines.end()


def stop(engines, rank):
    """Stop a rank's process with SIGSTOP."""
    pid = engines.records()[rank].pid
    os.kill(pid, signal.SIGSTOP)
    STOPPED.add(pid)


def stopped(engines, rank):
    return engines.records()[rank].pid in STOPPED


def meanwhile(monkeypatch, act):
    """Do something once while the ranks form a world."""
    wait, pending = Forming.wait, [act]

    def acting(forming):
        if pending:
            pending.pop()()
        return wait(forming)

    monkeypatch.setattr(Forming, "wait", acting)


def test_forming_survives_a_kill_at_any_moment(three):
    """No rank hangs, only the killed one is lost, and all form a world once it is replaced."""
    chance = random.Random(1)
    for _ in range(KILLS):
        before = [engine.pid for engine in three.records()]
        victim = chance.randrange(3)
        killing = threading.Timer(chance.random() * 0.06, os.kill, (before[victim], signal.SIGKILL))
        killing.start()
        with contextlib.suppress(EngineError):
            three.form()
        killing.join()
        until(lambda: three.lost)
        assert [victim] == three.replace_lost()
        three.form()
        after = [engine.pid for engine in three.records()]
        assert [victim] == [rank for rank in range(3) if before[rank] != after[rank]]
        assert dict(enumerate(after)) == three.call(range(3), "ping")


def test_a_rank_that_never_comes_is_killed_and_named(three):
    """The others are released, keep their processes, and form a world once it is replaced."""
    before = [engine.pid for engine in three.records()]
    stop(three, 1)
    three.timeout_s = 1.0
    with pytest.raises(ClusterError, match=r"did not join the others within 1 s"):
        three.form()
    assert (False, [1]) == (three.formed, three.lost)
    three.timeout_s = HUNG_S
    three.replace_lost()
    three.form()
    assert [before[0], before[2]] == [three.records()[rank].pid for rank in (0, 2)]


def test_an_interrupt_ends_forming(three, monkeypatch):
    """Although a rank does not join; that rank has to be replaced."""
    stop(three, 1)
    meanwhile(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        three.form()
    assert [1] == three.replace_lost()
    three.form()


def test_a_release_ends_the_wait_of_ranks(three, monkeypatch):
    """With PeerLostError, and alive, although torch alone would wait for minutes."""
    before = [engine.pid for engine in three.records()]
    stop(three, 2)
    meanwhile(monkeypatch, three.release)
    with pytest.raises(EngineError, match=r"PeerLostError: the rendezvous was ended|rank 2: the process ended"):
        three.form()
    assert [2] == three.replace_lost()
    three.form()
    assert before[:2] == [engine.pid for engine in three.records()][:2]


@pytest.mark.programs
def test_hundreds_of_generations_leak_nothing(three):
    """Neither sockets nor threads nor memory, in the ranks and here."""
    processes = [psutil.Process(), *(psutil.Process(engine.pid) for engine in three.records())]

    def held():
        return [(process.num_fds(), process.num_threads()) for process in processes]

    for _ in range(WARM_UP):
        three.form()
    before, memory = held(), [process.memory_info().rss for process in processes]
    for _ in range(GENERATIONS - WARM_UP):
        three.form()
    until(lambda: all(now[0] <= then[0] and now[1] <= then[1] for now, then in zip(held(), before, strict=True)))
    grown = [process.memory_info().rss - then for process, then in zip(processes, memory, strict=True)]
    assert max(grown) < 4 * MIB, grown
