"""The short part of the chaos suite: after kills, errors and hangs, the numbers are those of an undisturbed run."""

from __future__ import annotations

import functools
import random

import pytest
from lab import Lab
from scenarios import kill_at_a_checkpoint
from shared_cluster import ENGINES

pytestmark = pytest.mark.programs

RANDOM = random.Random(0)
KILLS = {
    "forward, the first step": ("shared weights", ("forward", 0, 0)),
    "backward": ("shared weights", ("backward", 1, 7)),
    "before the update": ("replicas", ("update", 0, 12)),
    "after the update": ("shared weights", ("updated", 1, 13)),
    "a collective": ("replicas", ("backward", 1, 5, "kill 0.001")),
    "data": ("own optimizer", ("data", "any", 310)),
    "evaluation in the middle": ("stream", ("evaluation", 1, 10)),
    "evaluation at the end": ("shared weights", ("evaluation", 0, 20)),
    "all ranks": ("own optimizer", ("forward", 0, 11), ("forward", 1, 11)),
    "recovery": ("replicas", ("forward", 0, 4), ("unpack", 1, 1)),
}


@pytest.fixture(scope="module")
def module_lab(shared_cluster):
    """The results of undisturbed runs, for all tests of this module."""
    lab = Lab("shared memory", shared_cluster.ready(), ranks=ENGINES)
    yield lab
    lab.close()


@pytest.fixture
def lab(module_lab, cluster):
    """A lab on the shared cluster."""
    module_lab.cluster = cluster
    return module_lab


@pytest.mark.parametrize("kill", KILLS)
def test_killed_ranks_change_no_number(lab, kill):
    """In any phase, on every way to save state: the bits of weights, optimizer and history of an undisturbed run."""
    workload, *traps = KILLS[kill]
    trial = lab.survives(workload, *traps)
    assert trial.problem == ""
    assert len(trial.seconds) == len(traps) or "end" in kill, "each kill is recovered from"


def test_a_rank_killed_while_it_writes_a_checkpoint_changes_no_number(lab):
    """While the folder of a checkpoint exists, and its checkpoint.json does not."""

    kill = functools.partial(kill_at_a_checkpoint, lab, 1)
    assert lab.survives("shared weights", meanwhile=kill, disk=True, checkpoint_every=3).problem == ""


@pytest.mark.parametrize(("workload", "phase"), [("shared weights", "backward"), ("replicas", "evaluation")])
def test_an_exception_is_raised_once_and_resume_continues_from_the_step_it_names(lab, workload, phase):
    """With rank and line; the engines live, and resume gives the bits of an undisturbed run."""
    assert lab.fails(workload, phase, 1, 10).problem == ""


@pytest.mark.parametrize("now", [False, True])
def test_a_stopped_run_resumes_with_the_same_bits(lab, now):
    """At a random moment; the model holds the weights of the step that the run names."""
    assert lab.stops("shared weights", RANDOM, now=now, epochs=10).problem == ""


@pytest.mark.parametrize("hang", ["hang", "hang_in_c"])
def test_a_hang_is_stopped_and_the_run_resumes_with_the_same_bits(lab, hang):
    """In Python, and in C code that no signal reaches."""
    assert lab.stops("replicas", RANDOM, ("forward", 1, 6, hang), now=True).problem == ""


def test_killed_ranks_change_no_number_on_the_other_channel(cluster):
    """Over gloo, in the middle of its collectives and before the update."""
    cluster.stop()
    lab = Lab("process group", ranks=ENGINES)
    try:
        for rank, phase in enumerate(("update", "backward")):
            assert lab.survives("replicas", (phase, rank, 8)).problem == ""
    finally:
        lab.close()
