"""Slurm: what is asked of it, and what its answers mean; `tests/hosts/test_launchers.py` has it."""

from __future__ import annotations

import pytest

from nbdist.cluster.hosts.slurm import Slurm, SlurmJob, _job_of, _seconds
from nbdist.errors import PlanError
from nbdist.plan import available_cores


@pytest.mark.parametrize(
    ("words", "seconds"),
    [("1-02:03:04", 93784), ("2:03:04", 7384), ("3:04", 184), ("0:59", 59), ("UNLIMITED", None), ("", None)],
)
def test_how_long_a_job_has(words, seconds):
    assert _seconds(words) == seconds


def test_which_job_it_is():
    """In what salloc writes; the last word counts."""
    assert _job_of(["salloc: Pending job allocation 12", "salloc: job 12 queued and waiting for resources"]) == "12"
    assert _job_of(["salloc: Granted job allocation 7"]) == "7"
    assert _job_of(["salloc: error: invalid partition"]) == ""


def test_an_agent_is_a_step_on_its_node():
    """With all that the job has there."""
    command = Slurm(job="7").agent_command("h1")
    assert command[:2] == ["srun", "--jobid=7"]
    assert {"--nodelist=h1", "--nodes=1", "--ntasks=1", "--overlap"} <= {*command}


@pytest.fixture
def job():
    started = SlurmJob("7", ["h1", "h2", "h3"])
    yield started
    started.end()


def test_engines_are_spread_over_nodes(job):
    assert job.engines(None) == {"h1": None, "h2": None, "h3": None}
    assert job.engines(7) == {"h1": 3, "h2": 2, "h3": 2}
    with pytest.raises(PlanError, match="2 engines are fewer than the 3 hosts"):
        job.engines(2)


def test_no_more_cores_than_the_job_has(monkeypatch):
    """Where the site does not bind it to them."""
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert available_cores() == 1
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "100000")
    assert available_cores() < 100000
