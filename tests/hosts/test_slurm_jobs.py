"""Slurm jobs: asked for, waited for, refused; the one that the notebook is in; and how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from shared_cluster import HUNG_S, until
from slurm_hosts import asking
from small_training import DATA, OPTIONS, bits, model

import nbdist
from nbdist.cluster.hosts.slurm import SlurmJob
from nbdist.errors import ClusterError, NbdistError, PlanError

OPTIONS = {**OPTIONS, "strategy": "dp=2", "epochs": None, "steps": 10**6}


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


@pytest.mark.usefixtures("no_agents")
def test_a_job_ends_with_its_kernel(slurm, network):
    """However that ends: nothing is left."""
    kernel = program([], "nodes=2, engines=2")
    assert len(kernel.stdout.readline().split()) == 2
    os.kill(kernel.pid, signal.SIGKILL)
    kernel.communicate()
    until(lambda: not slurm.jobs)
    until(lambda: not any(network.processes(host) for host in network.names))


def test_a_job_whose_salloc_does_not_end_is_cancelled(slurm):
    """And nothing is left of it here."""
    job = SlurmJob.begin(1, 1, (), lambda words: None)
    (holder,) = asking()
    holder.suspend()
    job.end()
    assert not asking()
    until(lambda: not slurm.jobs)


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


@pytest.mark.usefixtures("no_agents")
def test_a_job_that_is_cancelled_leaves_the_newest_weights(slurm, network):
    """In the notebook, in one sentence; and nothing on its nodes."""
    with nbdist.Cluster(2, launcher="slurm", nodes=2, device="cpu", spares=0) as cluster:
        run = cluster.train(trained := model(), DATA, loss="mse", background=True, **OPTIONS)
        until(lambda: run.control.snapshot_store.newest is not None)
        slurm.ask("scancel", "--user=root")
        with pytest.raises(NbdistError) as failed:
            run.wait(HUNG_S)
        words = r"all hosts are lost: .*\nThe model holds the weights after step \d+, from which --resume continues"
        assert re.search(words, str(failed.value))
        assert bits(trained) != bits(model())
        until(lambda: not any(network.processes(host) for host in network.names))
        assert not [host for host in network.names if network.run(host, "ls -d /tmp/nbdist-* 2>/dev/null")]


@pytest.mark.usefixtures("no_agents")
def test_a_job_that_is_preempted_saves_a_checkpoint_first(slurm, network, shared):
    """As each of its processes gets SIGTERM: the engines go on until that is done."""
    with nbdist.Cluster(2, launcher="slurm", nodes=2, device="cpu", spares=0) as cluster:
        options = {**OPTIONS, "checkpoint": str(shared / "saved")}
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
        options = {**OPTIONS, "checkpoint": str(shared / "saved")}
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
