"""Engines through Slurm, MPI and a running ipyparallel cluster: the bits of one host, and lost hosts."""

from __future__ import annotations

import functools
import os
import re
import shutil
from pathlib import Path

import pytest
import slurm_hosts
from gate import Gate
from host_network import CONTROL_VARIABLE, HostNetwork
from shared_cluster import HUNG_S, until
from small_training import DATA, OPTIONS, bits, held, hosts_of, model
from torch import nn

import nbdist
from nbdist.cli import main
from nbdist.cluster.hosts.waiting_hosts import end_hosts

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


@pytest.fixture(scope="module", params=KINDS)
def launched(request):
    """The arguments of a cluster of two engines on each of two hosts."""
    HostNetwork(os.environ[CONTROL_VARIABLE]).mend()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "slurm":
            slurm = request.getfixturevalue("_slurm")
            patch.setenv("SLURM_CONF", slurm_hosts.CONF)
            slurm.start_nodes()
            yield {"launcher": "slurm", "nodes": 2, "engines": 4, "launcher_args": "--nodelist=h1,h2"}
            slurm.start_nodes()  # else the job waits for one that is down
            until(lambda: not slurm.jobs and not slurm_hosts.asking())
        elif request.param == "ipyparallel":
            users = request.getfixturevalue("_users")
            users.start_engines()
            yield {"connect": str(users.file)}
        else:
            if shutil.which(request.param) is None:
                pytest.skip(f"MPI is NOT tested with {request.param}: it is not installed")
            for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
                patch.setenv(name, "1")
            profile = Path.home() / ".ipython" / "profile_default"
            profile.mkdir(parents=True, exist_ok=True)
            (profile / "ipcluster_config.py").write_text(f"get_config().MPILauncher.mpi_cmd = [{request.param!r}]\n")
            yield {"launcher": "mpi", "hosts": {"h1": 2, "h2": 2}}
            end_hosts()  # mpiexec ends with them
            (profile / "ipcluster_config.py").unlink()


@pytest.fixture(scope="module")
def _cluster(launched, expected):
    """It stays until the last test of its kind."""
    with nbdist.Cluster(device="cpu", **launched) as started:
        yield started


def test_doctor_examines_the_hosts_and_trains_there(launched, capsys):
    """Through the same launcher. Engines of a running cluster pass on no answers: there it trains only."""
    named = {**launched, "hosts": ",".join(f"{name}:{count}" for name, count in launched.get("hosts", {}).items())}
    engines = ["-n", str(named.pop("engines"))] if "engines" in named else []
    words = [f"--{name.replace('_', '-')}={value}" for name, value in named.items() if value]
    assert 0 == main(["doctor", *engines, *words, "--device", "cpu", "--steps", "2"])
    end_hosts()  # as at the end of the command
    written = capsys.readouterr().out
    assert "4 engines started" in written
    assert "all is well" in written
    for tried in ("log in", "versions", "to this host", "clock", "shared folder"):
        assert ("connect" in launched) or re.search(rf"h1 +{tried} +ok", written)


def test_the_bits_of_one_host(cluster, expected):
    assert cluster.transport == "shared memory and TCP (eth0)"
    assert trained_on(cluster) == expected


def held_run(cluster: nbdist.Cluster, gate: Gate) -> tuple[nbdist.Run, nn.Module]:
    """A run whose last stages are held at the gate."""
    loss = functools.partial(held, gate)
    run = cluster.train(trained := model(), DATA, background=True, loss=loss, **OPTIONS)
    until(lambda: all(gate.is_reached("forward", rank) for rank in (1, 3)))
    return run, trained


def test_a_killed_engine_is_replaced_on_its_host(cluster, network, expected, shared):
    run, trained = held_run(cluster, gate := Gate(shared))
    network.run("h2", f"kill -9 {cluster.engines[2].pid}")
    gate.open("forward")
    run.wait(HUNG_S)
    assert bits(trained) == expected
    assert hosts_of(cluster) == ["h1", "h1", "h2", "h2"]


def test_a_lost_host_costs_no_bit_and_no_step(cluster, network, expected, shared):
    """Nor does it end the others' job."""
    run, trained = held_run(cluster, gate := Gate(shared))
    network.crash("h2")
    gate.open("forward")
    run.wait(HUNG_S)
    assert bits(trained) == expected
    assert hosts_of(cluster) == ["h1"] * 4
    assert "all continue from step 6" in str(run.progress.notes)
