"""Engines through Slurm, MPI and a running ipyparallel cluster: the bits of one host, lost hosts, and how jobs end."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import slurm_hosts
from gate import Gate
from host_network import CONTROL_VARIABLE, HostNetwork
from shared_cluster import HUNG_S, until
from small_training import DATA, OPTIONS, bits, held, model
from users_cluster import UsersCluster

import nbdist
from nbdist.cli import main
from nbdist.errors import ClusterError, NbdistError, PlanError

OPTIONS = {**OPTIONS, "epochs": 2, "strategy": "dp=2,pp=2"}
KINDS = ["slurm", "mpiexec.openmpi", "mpiexec.mpich", "ipyparallel"]


def trained_on(cluster: nbdist.Cluster) -> list[bytes]:
    cluster.train(trained := model(), DATA, loss=functools.partial(held, None), **OPTIONS)
    return bits(trained)


@pytest.fixture(scope="module")
def expected():
    """The bits of four ranks of one host."""
    with nbdist.Cluster(4, device="cpu", spares=0) as cluster:
        return trained_on(cluster)


@pytest.fixture(scope="module")
def _slurm():
    if not slurm_hosts.installed():
        pytest.skip("Slurm is NOT tested: it is not installed")
    slurm = slurm_hosts.SlurmHosts(HostNetwork(os.environ[CONTROL_VARIABLE]))
    slurm.up()
    yield slurm
    slurm.down()


@pytest.fixture
def slurm(network, _slurm, monkeypatch):
    """Slurm, of which every host but this one is a node; all are idle."""
    monkeypatch.setenv("SLURM_CONF", slurm_hosts.CONF)
    _slurm.start_nodes()
    return _slurm


@pytest.fixture(scope="module")
def _users():
    with tempfile.TemporaryDirectory(prefix=".shared-", dir=Path(__file__).parent) as folder:
        users = UsersCluster(HostNetwork(os.environ[CONTROL_VARIABLE]), Path(folder), ["h1", "h2"], each=2)
        try:
            users.up()
            yield users
        finally:
            users.down()


@pytest.fixture
def users(network, _users):
    """The user's cluster, whose engines are left as they were."""
    _users.start_engines()
    _users.client[:].push({"mine": 7}, block=True)
    engines, pids = list(_users.client.ids), _users.client[:].apply_sync(os.getpid)
    yield _users
    if engines == _users.client.ids:  # no host has crashed
        assert _users.client[:].pull("mine", block=True) == [7] * len(pids)
        assert _users.client[:].apply_sync(os.getpid) == pids


@pytest.fixture(params=KINDS)
def launched(request, network, monkeypatch, _users):
    """The arguments of a cluster of two engines on each of two hosts."""
    if request.param == "slurm":
        slurm = request.getfixturevalue("slurm")
        yield {"launcher": "slurm", "nodes": 2, "engines": 4, "launcher_args": "--nodelist=h1,h2"}
        until(lambda: not slurm.jobs)
    elif request.param == "ipyparallel":
        yield {"connect": str(request.getfixturevalue("users").file)}
    else:
        if shutil.which(request.param) is None:
            pytest.skip(f"MPI is NOT tested with {request.param}: it is not installed")
        for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
            monkeypatch.setenv(name, "1")
        profile = Path.home() / ".ipython" / "profile_default"
        profile.mkdir(parents=True, exist_ok=True)
        (profile / "ipcluster_config.py").write_text(f"get_config().MPILauncher.mpi_cmd = [{request.param!r}]\n")
        yield {"launcher": "mpi", "hosts": {"h1": 2, "h2": 2}}
        (profile / "ipcluster_config.py").unlink()


def test_the_bits_of_one_host(launched, expected):
    with nbdist.Cluster(device="cpu", **launched) as cluster:
        assert ["h1", "h1", "h2", "h2"] == [engine.host for engine in cluster.engines]
        assert cluster.transport == "shared memory and TCP (eth0)"
        assert trained_on(cluster) == expected


def test_doctor_examines_the_hosts_and_trains_there(launched, capsys):
    """Through the same launcher. Engines of a running cluster pass on no answers: there it trains only."""
    named = {**launched, "hosts": ",".join(f"{name}:{count}" for name, count in launched.get("hosts", {}).items())}
    engines = ["-n", str(named.pop("engines"))] if "engines" in named else []
    words = [f"--{name.replace('_', '-')}={value}" for name, value in named.items() if value]
    assert 0 == main(["doctor", *engines, *words, "--device", "cpu", "--steps", "2"])
    written = capsys.readouterr().out
    assert "4 engines started" in written
    assert "all is well" in written
    for tried in ("log in", "versions", "to this host", "clock", "shared folder"):
        assert ("connect" in launched) or re.search(rf"h1 +{tried} +ok", written)


def test_a_lost_host_costs_no_bit_and_no_step(launched, network, expected, shared):
    """Nor does it end the others' job."""
    gate = Gate(shared)
    with nbdist.Cluster(device="cpu", **launched) as cluster:
        loss = functools.partial(held, gate)
        run = cluster.train(trained := model(), DATA, background=True, loss=loss, **OPTIONS)
        until(lambda: all(gate.is_reached("forward", rank) for rank in (1, 3)))  # of the last stages
        network.crash("h2")
        gate.open("forward")
        run.wait(HUNG_S)
        assert bits(trained) == expected
        assert ["h1"] * 4 == [engine.host for engine in cluster.engines]
        assert "all continue from step 6" in str(run.progress.notes)


def test_a_killed_engine_is_replaced_on_its_host(launched, network, expected, shared):
    gate = Gate(shared)
    with nbdist.Cluster(device="cpu", **launched) as cluster:
        loss = functools.partial(held, gate)
        run = cluster.train(trained := model(), DATA, background=True, loss=loss, **OPTIONS)
        until(lambda: all(gate.is_reached("forward", rank) for rank in (1, 3)))
        network.run("h2", f"kill -9 {cluster.engines[2].pid}")
        gate.open("forward")
        run.wait(HUNG_S)
        assert bits(trained) == expected
        assert ["h1", "h1", "h2", "h2"] == [engine.host for engine in cluster.engines]


def test_a_job_that_waits_is_withdrawn(slurm):
    """The user is told why it waits, and interrupts."""
    other = subprocess.Popen(["srun", f"--nodes={len(slurm.nodes)}", "--exclusive", "sleep", "1000"])
    until(lambda: slurm.jobs == ["RUNNING"])
    shown = []

    def tell(words: str) -> None:
        shown.append(words)
        if "waits in the queue" in words and "(" in words:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nbdist.Cluster(launcher="slurm", nodes=1).start(tell)
    assert re.search(r"job \d+ waits in the queue for \d+ s \((Resources|Priority|None)", shown[-1])
    until(lambda: slurm.jobs == ["RUNNING"])
    other.terminate()
    other.wait()


def test_a_job_that_slurm_refuses(slurm):
    with pytest.raises(ClusterError, match=r"Slurm gives no job: .*invalid partition specified: nowhere"):
        nbdist.Cluster(launcher="slurm", launcher_args="--partition nowhere").start()
    assert not slurm.jobs


PROGRAM = """
import nbdist, sys
with nbdist.Cluster(launcher="slurm", device="cpu", spares=0, {arguments}) as cluster:
    print(" ".join(engine.host for engine in cluster.engines), flush=True)
    sys.stdin.readline()
"""


def program(begin: list[str], arguments: str) -> subprocess.Popen[str]:
    """A process that starts a cluster and tells its hosts."""
    command = [*begin, sys.executable, "-c", PROGRAM.format(arguments=arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_job_ends_with_its_kernel(slurm, network):
    """However that ends: nothing is left."""
    kernel = program([], "nodes=2, engines=2")
    assert len(kernel.stdout.readline().split()) == 2
    os.kill(kernel.pid, signal.SIGKILL)
    kernel.communicate()
    until(lambda: not slurm.jobs)
    until(lambda: not any(network.processes(host) for host in network.names))


def test_the_job_that_the_notebook_is_in_is_used(slurm):
    """On all its nodes, or on some, as many engines as it has cores; also from one of them."""
    for begin, arguments, hosts in (
        (["salloc", "--nodelist=h1,h2"], "", "h1 h2"),
        (["salloc", "--nodelist=h1,h2", "--ntasks=4"], "nodes=1", "h1 h1"),
        (["salloc", "--nodelist=h1,h2", "srun", "-w", "h2", "-N1", "-n1", "--overlap"], "engines=2", "h2 h1"),
    ):
        kernel = program(begin, arguments)
        assert kernel.stdout.readline().split() == hosts.split()
        kernel.communicate("end\n")
        assert kernel.returncode == 0
        until(lambda: not slurm.jobs)


def test_engines_are_added_within_the_job(slurm):
    """On its nodes, as many as their cores bear; no other job is asked for."""
    with nbdist.Cluster(2, launcher="slurm", nodes=2, device="cpu", spares=0) as cluster:
        cluster.scale(4)
        assert ["h1", "h1", "h2", "h2"] == sorted(engine.host for engine in cluster.engines)
        assert slurm.jobs == ["RUNNING"]
        with pytest.raises(PlanError, match="100 engines are more than the 2 hosts can run"):
            cluster.scale(100)


def test_a_job_that_is_cancelled_leaves_the_newest_weights(slurm, network):
    """In the notebook, in one sentence; and nothing on its nodes."""
    with nbdist.Cluster(2, launcher="slurm", nodes=2, device="cpu", spares=0) as cluster:
        options = {**OPTIONS, "strategy": "dp=2", "epochs": None, "steps": 10**6}
        run = cluster.train(trained := model(), DATA, loss="mse", background=True, **options)
        until(lambda: run.control.snapshot_store.newest is not None)
        slurm.ask("scancel", "--user=root")
        with pytest.raises(NbdistError) as failed:
            run.wait(HUNG_S)
        words = r"all hosts are lost: .*\nThe model holds the weights after step \d+, from which --resume continues"
        assert re.search(words, str(failed.value))
        assert bits(trained) != bits(model())
        until(lambda: not any(network.processes(host) for host in network.names))
        assert not [host for host in network.names if network.run(host, "ls -d /tmp/nbdist-* 2>/dev/null")]


def test_a_job_that_is_preempted_saves_a_checkpoint_first(slurm, network, shared):
    """As each of its processes gets SIGTERM: the engines go on until that is done."""
    with nbdist.Cluster(2, launcher="slurm", nodes=2, device="cpu", spares=0) as cluster:
        options = {**OPTIONS, "strategy": "dp=2", "epochs": None, "steps": 10**6, "checkpoint": str(shared / "saved")}
        run = cluster.train(model(), DATA, loss="mse", background=True, **options)
        until(lambda: run.control.snapshot_store.newest is not None)
        slurm.ask("scancel", "--signal=TERM", "--user=root")  # as before the end, which does not follow here
        with pytest.raises(NbdistError, match="all hosts are lost"):
            run.wait(HUNG_S)
        assert "got SIGTERM, as before the end of its job: a checkpoint is saved in" in str(run.progress.notes)
        assert len(list(shared.glob("saved/*/checkpoint.json"))) == 1
    until(lambda: not any(network.processes(host) for host in network.names))
    assert not [host for host in network.names if network.run(host, "ls -d /tmp/nbdist-* 2>/dev/null")]


def test_a_checkpoint_is_saved_before_the_time_limit(slurm, shared):
    """And the run says so."""
    with nbdist.Cluster(2, launcher="slurm", nodes=2, launcher_args="--time 1", device="cpu", spares=0) as cluster:
        options = {**OPTIONS, "strategy": "dp=2", "epochs": None, "steps": 10**6, "checkpoint": str(shared / "saved")}
        run = cluster.train(model(), DATA, loss="mse", background=True, **options)
        until(lambda: "its time limit: a checkpoint is saved in" in str(run.progress.notes))
        until(lambda: list(shared.glob("saved/*/checkpoint.json")))
        run.stop()
        run.wait()


def test_what_is_no_job(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "h[1-2]")
    with pytest.raises(PlanError, match="3 nodes are more than job 7 has, which is 2"):
        nbdist.Cluster(launcher="slurm", nodes=3).start()
    with pytest.raises(PlanError, match=r"launcher_args .--time 5. are for a new job, and this notebook is in job 7"):
        nbdist.Cluster(launcher="slurm", launcher_args="--time 5")
    with pytest.raises(PlanError, match="1 engines are fewer than the 2 hosts"):
        nbdist.Cluster(1, launcher="slurm").start()


def test_the_hosts_of_a_profile_and_some_of_them(users, monkeypatch, tmp_path):
    """As many engines as it has there, or as are asked for; unknown hosts are named."""
    (tmp_path / "profile_users").symlink_to(users.file.parent.parent)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for options, hosts in (
        ({"profile": "users"}, "h1 h1 h2 h2"),
        ({"profile": "users", "engines": 3}, "h1 h1 h2"),
        ({"profile": "users", "hosts": {"h2": 1}}, "h2"),
    ):
        with nbdist.Cluster(device="cpu", spares=0, **options) as cluster:
            assert hosts.split() == [engine.host for engine in cluster.engines]
    with pytest.raises(PlanError, match=r"host h3 is none of the cluster's: h1, h2"):
        nbdist.Cluster(profile="users", hosts={"h3": 1}).start()


def test_a_host_of_a_running_cluster_that_is_back_is_used_again(users, network):
    """Through an engine that has another number then."""
    with nbdist.Cluster(device="cpu", connect=str(users.file)) as cluster:
        network.crash("h2")
        until(lambda: [2, 3] == [engine.rank for engine in cluster.engines if engine.state == "lost"])
        network.mend()
        users.start_engines()
        until(lambda: ["h1", "h1", "h2", "h2"] == [engine.host for engine in cluster.start().engines])
