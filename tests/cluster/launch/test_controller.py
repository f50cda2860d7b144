"""The controller or the fork server is killed: nothing hangs, and one start recovers."""

from __future__ import annotations

import os
import signal
import threading

import psutil
import pytest
from gate import Gate
from shared_cluster import ENGINES, HUNG_S, gone, kill_controller, of_cluster, until
from tasks import classes, net

from nbdist.cluster import current_cluster, current_server
from nbdist.errors import ClusterError

pytestmark = pytest.mark.programs

ENDED = "has ended, so the engines cannot be reached: %dist_start starts new ones"


def kill_store(cluster):
    os.kill(cluster._up._store.server_pid, signal.SIGKILL)
    until(lambda: not cluster.reachable)


@pytest.fixture(params=[kill_controller, kill_store])
def kill(request):
    """Kills the controller or the store."""
    return request.param


@pytest.fixture
def unreachable(cluster, kill):
    """A cluster whose controller or store was killed; its processes and its folder."""
    processes, folder = of_cluster(cluster)
    kill(cluster)
    return cluster, processes, folder


def test_without_its_controller_or_its_store_a_cluster_refuses_everything(unreachable):
    """With the reason and what to do, at once."""
    cluster, _, _ = unreachable
    assert not cluster.reachable
    for act in (cluster.check_ready, lambda: cluster.push(a=1), lambda: cluster.pull("a"), lambda: cluster.execute("")):
        with pytest.raises(ClusterError, match=ENDED):
            act()


def test_one_start_ends_what_is_left_and_starts_new_engines(unreachable):
    """No process and no folder of the old engines stays, and the new ones work."""
    cluster, processes, folder = unreachable
    assert len(processes) > 2 * ENGINES
    assert cluster.start() is cluster is current_cluster()
    assert gone(processes)
    assert not folder.exists()
    cell = cluster.execute("print(rank)")
    cell.wait()
    assert {0: "0\n", 1: "1\n"} == cell.printed()


def test_a_stop_ends_what_is_left(unreachable):
    """Nothing stays behind."""
    cluster, processes, folder = unreachable
    cluster.stop()
    assert gone(processes)
    assert not folder.exists()


def test_a_run_ends_with_the_reason(cluster, kill, tmp_path):
    """The run fails, which the last update shows too; the next start works."""
    states, gate = [], Gate(tmp_path, 2)
    run = cluster.train(
        net(), classes(), loss="cross_entropy", steps=10**9, lr_scheduler=gate, background=True,
        watch=lambda run: states.append(run.state),
    )  # fmt: skip
    gate.wait(2, run=run)
    kill(cluster)
    gate.open()
    with pytest.raises(ClusterError, match=ENDED):
        run.wait()
    until(lambda: states[-1] == "failed")
    assert cluster.start().reachable


def test_a_cell_that_waits_ends_when_the_controller_does(cluster):
    """So does a pull."""
    cell = cluster.execute("print('in', flush=True); import time; time.sleep(3600)")
    until(lambda: all(cell.printed().values()))
    errors = []

    def wait():
        try:
            cell.wait()
        except ClusterError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    kill_controller(cluster)
    waiting.join(HUNG_S)
    assert not waiting.is_alive()
    assert ENDED in errors[0]


def test_a_killed_fork_server_is_replaced(cluster):
    """Engines run on without it; the next engine needs and starts a new one, and nothing is left in the end."""
    until(lambda: cluster.spare_engines)
    server, (spare,) = psutil.Process(current_server().pid), cluster.spare_engines
    old, kept = psutil.Process(cluster.engines[1].pid), cluster.engines[0].pid
    server.kill()
    until(lambda: current_server() is None)
    old.kill()
    until(lambda: cluster.engines[1].state == "lost")
    cluster.start()
    assert [kept, spare.pid] == [engine.pid for engine in cluster.engines]
    (follower,) = until(lambda: cluster.spare_engines)
    assert server.pid != current_server().pid == psutil.Process(follower.pid).ppid()
    processes, folder = of_cluster(cluster)
    cluster.stop()
    assert gone(processes)
    assert not folder.exists()
