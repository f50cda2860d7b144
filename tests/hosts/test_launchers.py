"""Engines through Slurm, MPI and a running ipyparallel cluster: the bits of one host, and lost hosts."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from gate import Gate
from host_network import CONTROL_VARIABLE, HostNetwork
from shared_cluster import HUNG_S, until
from small_training import DATA, OPTIONS, bits, held, model
from users_cluster import UsersCluster

import nbdist
from nbdist.cli import main
from nbdist.cluster.hosts.waiting_hosts import end_hosts
from nbdist.errors import PlanError

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
        end_hosts()  # mpiexec ends with them
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
