"""Start and stop of a cluster, its engine records, and values sent to engines and back."""

from __future__ import annotations

import contextlib
import gc
import pickle
import socket

import numpy as np
import psutil
import pytest
import torch
from ipyparallel.cluster.launcher import LocalProcessLauncher
from shared_cluster import ENGINES, folder_of, gone, marked, until
from tasks import classes, net, process_of_each_rank

import nbdist
from nbdist.cluster import Cluster
from nbdist.cluster.hosts import fork_client
from nbdist.cluster.launch.launcher import Launch
from nbdist.core.transfer.payload import pack
from nbdist.errors import ClusterError, PlanError, TaskError
from nbdist.process_mark import has_ended

MIB = 2**20


def out(cluster, source, **options):
    cell = cluster.execute(source, **options)
    cell.wait()
    return cell.printed()


def controllers(cluster):
    folder = folder_of(psutil.Process(cluster.engines[0].pid))
    return [p for p in marked() if folder_of(p) == folder and "controll" in " ".join([p.name(), *p.cmdline()])]


def test_engines_form_a_world_before_the_start_returns(cluster):
    """Every rank is in one world with all the others, and its names are in the cells' namespace."""
    source = "import torch.distributed as d; print(rank == d.get_rank(), world_size == d.get_world_size(), device)"
    assert out(cluster, source) == dict.fromkeys(range(ENGINES), "True True cpu\n")


def test_start_of_a_running_cluster_does_nothing(cluster):
    """The same processes are there afterwards."""
    before = cluster.engines
    assert cluster.start() is cluster
    assert cluster.engines == before


def test_a_first_start_collects_garbage_while_it_waits(cluster):
    """After torch's import a collection is due: else it would come within one of the first runs."""
    cluster.stop()
    fork_client.end_server()
    collected = []

    def note(phase, about):
        if phase == "start":
            collected.append(about["generation"])

    gc.disable()  # no one that Python itself finds due
    gc.callbacks.append(note)
    try:
        cluster.start()
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert collected == [2]


def test_records_tell_where_each_rank_trains(cluster):
    """Ranks, host, device and state are right, and each pid is the process that computes the loss."""
    run = cluster.train(net(), classes(), loss=process_of_each_rank())
    for rank, engine in enumerate(cluster.engines):
        assert (engine.rank, engine.host, engine.device, engine.state) == (rank, socket.gethostname(), "cpu", "idle")
        assert set(run.printed()[rank].split()) == {str(engine.pid)}


def test_a_stopped_cluster_leaves_nothing_and_starts_again(cluster, shared_cluster):
    """Stop (twice), a start that is too slow, a context manager, a new start: no process, folder or socket survives."""
    mine, store = [p for p in marked() if folder_of(p)], psutil.Process(cluster._up._store.server_pid)
    run = cluster.train(net(), classes(), loss="cross_entropy")
    folder = folder_of(psutil.Process(cluster.engines[0].pid))
    assert folder.is_dir()
    cluster.stop()
    cluster.stop()
    assert gone(mine)
    assert not folder.exists()
    assert run.state == "finished"
    assert gone([store])
    assert cluster.engines == []
    assert repr(cluster) == "Cluster(engines=2), not running"
    assert nbdist.current_cluster() is None
    with pytest.raises(ClusterError, match=r"not running: start it"):
        cluster.train(net(), classes(), loss="cross_entropy")

    with pytest.raises(ClusterError, match=r"after 0.01 s: raise --timeout"):
        nbdist.Cluster(2, device="cpu", timeout_s=0.01).start()
    assert not [p for p in marked() if folder_of(p)]

    with nbdist.Cluster(engines=1, device="cpu") as one:
        assert nbdist.current_cluster() is one
        assert one.train(net(), classes(), loss="cross_entropy").state == "finished"
    assert not [p for p in marked() if folder_of(p)]

    cluster.start()
    assert nbdist.current_cluster() is cluster
    assert cluster.train(net(), classes(), loss="cross_entropy").state == "finished"


def test_a_stop_leaves_nothing_where_ipyparallel_misses_something(shared_cluster, monkeypatch):
    """Such as a process whose end it has not noticed: it has ended all the same, and its folder is removed."""
    cluster = shared_cluster.ready()
    folder = folder_of(psutil.Process(cluster.engines[0].pid))

    async def late(launcher, timeout=None):
        raise TimeoutError("Process did not exit in 1 seconds.")

    monkeypatch.setattr(LocalProcessLauncher, "join", late)
    cluster.stop()
    assert not folder.exists()


def test_an_interrupted_start_leaves_nothing(shared_cluster, monkeypatch):
    """Not even while the error is referenced, as IPython does with the last one."""

    def interrupted(*_):
        raise KeyboardInterrupt

    shared_cluster.stop()
    before = children()
    monkeypatch.setattr(Launch, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        Cluster(ENGINES, device="cpu").start()
    until(lambda: children() <= before)
    assert kept.value is not None


def children():
    """The processes that this one has started itself."""
    return {process for process in psutil.Process().children() if not has_ended(process)}


def test_an_engine_that_cannot_load_torch_ends_the_start_with_its_reason(shared_cluster, tmp_path, monkeypatch):
    """The error holds the engine's log, and nothing is left running."""
    shared_cluster.stop()
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is torn')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torn = "ImportError: libtorch is torn"
    with pytest.raises(ClusterError, match=f"rank 0: {torn}"), pytest.warns(UserWarning, match=f"fork: {torn}"):
        nbdist.Cluster(2, device="cpu").start()
    assert not [p for p in marked() if folder_of(p)]


def test_one_cluster_a_kernel(cluster, untouched):
    """A second one is refused, with what to do, and the first keeps running."""
    second = nbdist.Cluster(1, device="cpu")
    with pytest.raises(ClusterError, match=r"running in this kernel already: stop it first"):
        second.start()
    assert second.engines == []
    second.stop()
    assert nbdist.current_cluster() is cluster


def test_default_size_is_that_of_the_machine_within_the_given_limit(monkeypatch):
    """One engine a core up to four (there are no GPUs with device cpu), or fewer where a limit says so."""
    monkeypatch.delenv("NBDIST_MAX_ENGINES", raising=False)
    assert nbdist.Cluster(device="cpu").size == min(nbdist.plan.available_cores(), 4)
    monkeypatch.setenv("NBDIST_MAX_ENGINES", "1")
    assert nbdist.Cluster(device="cpu").size == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engines": 0}, "0 engines is too few: use 1 or more"),
        ({"engines": 3}, r"3 engines are more than .*: use 2 or fewer"),
        ({"engines": "two"}, "engines must be a whole number, not 'two'"),
        ({"engines": 1.5}, "engines must be a whole number, not 1.5"),
        ({"device": "gpu"}, "unknown device 'gpu': use auto, cpu or cuda"),
        ({"timeout_s": 0}, "timeout 0 s is too short"),
        pytest.param(
            {"device": "cuda"}, "sees no GPU here: use cpu or auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_an_impossible_cluster_is_refused(monkeypatch, given, message):
    """Before anything is started; the error names the value and what to use."""
    monkeypatch.setenv("NBDIST_MAX_ENGINES", "2")
    with pytest.raises(PlanError, match=message):
        nbdist.Cluster(**given)


def test_values_travel_to_all_engines_and_back(cluster):
    """Tensors (shared memory stays shared), arrays, plain values and instances arrive unchanged."""
    base = torch.arange(6.0)
    cluster.push(both=(base, base[2:]), array=np.eye(2), plain={"a": [1, None]})
    assert out(cluster, "both[0][2] = 50; print(both[1][0].item(), array.sum(), plain)") == dict.fromkeys(
        range(ENGINES), "50.0 2.0 {'a': [1, None]}\n"
    )
    assert base[2] == 2.0, "what an engine writes stays there"
    out(cluster, "import torch; mine = torch.full((2,), rank + .5)")
    assert [cluster.pull("mine", rank).tolist() for rank in range(ENGINES)] == [[0.5, 0.5], [1.5, 1.5]]
    assert torch.equal(cluster.pull("both")[0], torch.tensor([0, 1, 50.0, 3, 4, 5]))


def test_a_pulled_object_is_of_the_notebooks_own_class(cluster):
    """The class is sent by value, and is the same object when it comes back."""

    class Point:
        def __init__(self, x):
            super().__init__()
            self.x = x

        def moved(self):
            return type(self)(self.x + 1)

    cluster.push(point=Point(1))
    out(cluster, "further = point.moved()")
    further = cluster.pull("further", 1)
    assert type(further) is Point
    assert further.x == 2


def test_a_class_made_on_an_engine_is_one_class_for_all_pulls(cluster):
    """Two instances pulled one after the other are of the same class here."""
    out(cluster, "class There:\n    pass\none, other = There(), There()")
    assert type(cluster.pull("one")) is type(cluster.pull("other"))


def test_an_unpicklable_value_is_named(cluster):
    """In a push, in a pull, and if a name or rank does not exist."""
    with pytest.raises(TaskError, match=r"rows\[0\] is a generator, which cannot be sent to another process"):
        cluster.push(rows=[(x for x in ())])
    out(cluster, "rows = (x for x in ())")
    with pytest.raises(ClusterError, match=r"rank 1: TaskError: it is a generator, which cannot be sent to another"):
        cluster.pull("rows", 1)
    with pytest.raises(ClusterError, match="'nowhere' is not defined on rank 1"):
        cluster.pull("nowhere", 1)
    with pytest.raises(PlanError, match="rank 2 does not exist: use 0 to 1"):
        cluster.pull("rows", 2)


def test_large_values_do_not_pass_through_the_controller(cluster):
    """50 MB to and from each engine do not grow its processes: only addresses pass there."""
    before = sum(p.memory_info().rss for p in controllers(cluster))
    big = torch.arange(50 * MIB // 8, dtype=torch.float64)
    cluster.push(big=big)
    assert torch.equal(cluster.pull("big", 1), big)
    cluster.train(net(), (torch.randn(50 * MIB // 24, 6), torch.zeros(50 * MIB // 24, dtype=torch.long)),
                  loss="cross_entropy", steps=2)  # fmt: skip
    assert sum(p.memory_info().rss for p in controllers(cluster)) - before < 20 * MIB

    payload, segment = pack(big)
    with contextlib.closing(segment):
        assert len(pickle.dumps(payload)) < 1000


def test_all_listeners_are_on_loopback(cluster):
    """Of every process of the cluster, in a world that has trained, and of the store that this process hosts."""
    cluster.train(net(), classes(), loss="cross_entropy")
    folder = folder_of(psutil.Process(cluster.engines[0].pid))
    listening = {
        process: [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        for process in [psutil.Process(), *(p for p in marked() if folder_of(p) == folder)]
    }
    assert len(listening) >= 1 + 2 * ENGINES
    assert all(listening[psutil.Process(engine.pid)] for engine in cluster.engines)
    assert {ip for ips in listening.values() for ip in ips} == {"127.0.0.1"}


def test_a_module_found_later_is_found_on_engines(cluster, tmp_path, monkeypatch):
    """A cell may extend the notebook's path after the engines have started."""
    (tmp_path / "found_later.py").write_text("ANSWER = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {0: "42\n", 1: "42\n"} == out(cluster, "import found_later; print(found_later.ANSWER)")
