"""A detached cluster and its run outlive their kernel: another process attaches to both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from gate import Gate
from shared_cluster import folder_of, gone, marked, until
from torch import nn

import nbdist
from nbdist.cluster import current_cluster, detached_clusters
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.errors import ClusterError, PlanError
from nbdist.telemetry.host import host_name

pytestmark = pytest.mark.programs

OWNER = """
import json, sys
import nbdist, torch
from gate import Gate
from torch import nn

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 96
    def __getitem__(self, row):
        return torch.sin(torch.arange(row, row + 6.0)), row % 3

cluster = nbdist.Cluster(2, device="cpu", detach=float(sys.argv[1])).start()
cluster.push(given=torch.arange(3))
cluster.execute("reported = rank + 10").wait()
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 3))
gate = Gate(sys.argv[2], 6)
run = cluster.train(net, Rows(), loss="cross_entropy", epochs=10, batch_size=16, lr=0.01, lr_scheduler=gate,
                    background=True, names=("net", "rows"))
if sys.argv[3] == "end":
    gate.open(6)
    run.wait()
else:
    gate.wait(6, run=run)
print(json.dumps([cluster.name, run.run_id, [engine.pid for engine in cluster.engines]]), flush=True)
sys.stdin.read()
"""
STEPS = 60
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def gate(tmp_path):
    """The gate that holds the run of `owner`."""
    return Gate(tmp_path, 6)


@pytest.fixture
def owner(shared_cluster, gate, tmp_path, monkeypatch):
    """``owner(how, detach=600)``: a process, and what it prints about its cluster.

    Its training is held after step 6, until the `gate` is opened; or has ended, where `how` is "end".
    """
    shared_cluster.stop()  # this process is to have another one
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")])))
    (tmp_path / "owner.py").write_text(OWNER)
    started = []

    def start(how="", detach=600.0):
        started.append(subprocess.Popen([sys.executable, tmp_path / "owner.py", str(detach), tmp_path, how],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))  # fmt: skip
        return started[-1], *json.loads(started[-1].stdout.readline())

    yield start
    gate.open()
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    mine = current_cluster()
    if mine is not None:
        mine.stop()
    for each in detached_clusters():  # a test has failed before it could end it, or did not take it over
        until(lambda each=each: not [c for c in detached_clusters() if c.name == each.name and c.owner])
        nbdist.Cluster.attach(each.name).stop()


def killed(process):
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(shared_cluster):
    """The final weights of the undisturbed run."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 96

        def __getitem__(self, row):
            return torch.sin(torch.arange(row, row + 6.0)), row % 3

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 3))
    shared_cluster.ready().train(net, Rows(), loss="cross_entropy", epochs=10, batch_size=16, lr=0.01)
    return net.state_dict()


def same(net, weights):
    return all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_kernel_that_is_killed_in_mid_training_costs_no_bit(shared_cluster, owner, gate, undisturbed):
    """The next one finds the same engines, busy, the run with its history, and at the end the trained model.

    Until then the cluster belongs to the first kernel, and `attach` is refused.
    """
    process, name, run_id, pids = owner()
    with pytest.raises(ClusterError, match=f"cluster {name} belongs to the kernel with process {process.pid}: "):
        nbdist.Cluster.attach()
    killed(process)
    until(lambda: [(c.name, c.owner, c.run_id, c.run_state) for c in detached_clusters()]
          == [(name, 0, run_id, "running")])  # fmt: skip
    names = {}
    with nbdist.Cluster.attach(namespace=names) as cluster:
        run = nbdist.last_run()
        assert (run.run_id, run.state, cluster.name) == (run_id, "running", name)
        assert [engine.pid for engine in cluster.engines] == pids
        gate.open()
        run.wait()
        assert (run.state, run.progress.step, len(run.history)) == ("finished", STEPS, 10)
        assert same(names["net"], undisturbed)
        again = cluster.train(names["net"], torch.utils.data.TensorDataset(torch.ones(32, 6), torch.arange(32) % 3),
                              loss="cross_entropy", epochs=1)  # fmt: skip
        assert again.state == "finished"


def test_a_rank_that_dies_while_there_is_no_kernel_is_replaced_by_the_next(shared_cluster, owner, gate, undisturbed):
    """Its snapshots are outside of it and of the kernel; its rank's cells and pushes are replayed."""
    process, _, _, pids = owner()
    killed(process)
    os.kill(pids[0], signal.SIGKILL)
    names = {}
    gate.open()
    with nbdist.Cluster.attach(namespace=names) as cluster:
        assert nbdist.last_run().wait().state == "finished"
        assert same(names["net"], undisturbed)
        assert [cluster.pull("reported", rank) for rank in range(2)] == [10, 11]
        assert cluster.pull("given", 0).tolist() == [0, 1, 2]


def test_attach_loads_the_weights_of_an_ended_run(shared_cluster, owner, undisturbed):
    """Also a second time, and into a model of the same shape that is there already."""
    process, _, run_id, _ = owner("end")
    killed(process)
    mine = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 3))
    names = {"net": mine}
    with nbdist.Cluster.attach(namespace=names):
        run = nbdist.last_run()
        assert (run.run_id, run.state, run.progress.step) == (run_id, "finished", STEPS)
        assert names["net"] is mine
        assert same(mine, undisturbed)


@pytest.fixture
def detached(shared_cluster):
    """A detached cluster of this process."""
    shared_cluster.stop()
    with nbdist.Cluster(2, device="cpu", detach=600.0, spares=0) as cluster:
        yield cluster


def test_a_cluster_of_another_host_is_not_removed(detached, monkeypatch):
    """Through a home that hosts share, its entry is neither removed nor attachable."""
    name, here = detached.name, host_name()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("NBDIST_HOST", "elsewhere")
        assert [] == detached_clusters()
        with pytest.raises(PlanError, match=f"cluster {name} was started on host {here}: attach to it there"):
            Anchor.reach(name)
    assert [name] == [cluster.name for cluster in detached_clusters()]


def _everything(pids):
    folder = folder_of(psutil.Process(pids[0]))
    return [process for process in marked() if folder_of(process) == folder], folder


def test_without_a_kernel_it_ends_when_the_time_is_over(shared_cluster, owner):
    """Engines, controller, anchor, folder and entry: nothing is left."""
    process, _, _, pids = owner(detach=1.0)
    everything, folder = _everything(pids)
    assert len(everything) >= 5
    killed(process)
    assert gone(everything)
    until(lambda: not folder.exists())
    assert not detached_clusters()


def test_it_ends_with_its_anchor(detached):
    """However the anchor ended, nothing outlives it, and the kernel can still call `stop`."""
    everything, folder = _everything([engine.pid for engine in detached.engines])
    (anchor,) = [p for p in psutil.Process().children() if "nbdist.cluster.launch.anchor_server" in p.cmdline()]
    anchor.kill()
    assert gone(everything)
    until(lambda: not folder.exists())


def test_there_has_to_be_one(shared_cluster):
    """And none in this kernel already; the error says what to do."""
    shared_cluster.ready()
    with pytest.raises(ClusterError, match="a cluster is running in this kernel already: stop it first"):
        nbdist.Cluster.attach()
    shared_cluster.stop()
    with pytest.raises(PlanError, match="no detached cluster lives: %dist_start --detach starts one"):
        nbdist.Cluster.attach()


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), True, "1h"])
def test_an_impossible_time_is_refused(seconds):
    """Before anything is started."""
    with pytest.raises(PlanError, match=r"engines cannot wait .* s for a kernel: use a number of seconds, more than 0"):
        nbdist.Cluster(2, device="cpu", detach=seconds)
