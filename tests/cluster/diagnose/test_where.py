"""Stacks of all ranks: the right rank and line, whatever they hang on."""

from __future__ import annotations

import os
import signal

import pytest
from gate import Gate
from shared_cluster import ENGINES, until
from tasks import classes, net

from nbdist.cluster.cells import cell_run
from nbdist.errors import EngineError

IMPORTS = "import threading, time, torch, torch.distributed as dist\n"


def start_cell(cluster, source, **options):
    """Start a cell that is labelled In[7]."""
    return cluster.execute(source, number=7, **options)


def verdict(cluster, words):
    """The verdict, once it contains `words`."""
    return until(lambda: found if words in (found := cluster.where().verdict) else "")


@pytest.fixture
def hanging(shared_cluster):
    """A cluster that ends with the test: torch's own collectives cannot be interrupted."""
    yield shared_cluster.ready()
    shared_cluster.stop()


def test_ranks_with_nothing_to_do(cluster):
    """They are idle, however often they are asked."""
    assert [f"all {ENGINES} ranks are idle"] * 3 == [str(cluster.where()) for _ in range(3)]


def test_a_rank_that_is_late_for_a_collective(hanging):
    """Its innermost line in the cell, with the source, and which rank waits for it where."""
    start_cell(
        hanging, f"{IMPORTS}def slow():\n    time.sleep(1e4)\nif rank == 1:\n    slow()\ndist.all_reduce(torch.ones(1))"
    )
    found = verdict(hanging, "in slow; rank 0 waits")
    assert found == "rank 1 is at Cell In[7], line 3, in slow; rank 0 waits for it in all_reduce (Cell In[7], line 6)"
    assert "---->   3     time.sleep(1e4)" in hanging.where().ranks[1].text


def test_ranks_in_different_collectives(hanging, monkeypatch):
    """Each with its line; the waiting cell warns by itself."""
    monkeypatch.setattr(cell_run, "_CHECK_S", 0.1)
    cell = start_cell(hanging, f"{IMPORTS}if rank == 0:\n    dist.barrier()\nelse:\n    dist.all_reduce(torch.ones(1))")
    found = (
        "the ranks are in different collectives, and wait for ever if they stay there: "
        "rank 0 in barrier (Cell In[7], line 3), rank 1 in all_reduce (Cell In[7], line 5)"
    )
    assert found == verdict(hanging, "different")
    waited = []

    def watch():
        if not waited and cell._where is None:  # it has warned
            waited.append(os.kill(hanging.engines[0].pid, signal.SIGKILL))

    with pytest.warns(UserWarning, match="this cell hangs") as warned, pytest.raises(EngineError):
        cell.wait(watch)
    assert [f"this cell hangs: {found}. Interrupt it (■)."] == [str(warning.message) for warning in warned]


def test_a_rank_with_more_data_than_the_others(hanging):
    """It waits in a collective for one that has ended the cell."""
    together = "for _ in range(3):\n    dist.all_reduce(torch.ones(1))\n"
    start_cell(hanging, f"{IMPORTS}{together}if rank == 1:\n    dist.all_reduce(torch.ones(1))")
    verdict(hanging, "rank 0 does nothing; rank 1 waits for it in all_reduce (Cell In[7], line 5)")
    assert hanging.where().deadlocked


def test_a_deadlock_in_a_function_of_an_earlier_cell(hanging):
    """The line is that of the cell that defined it."""
    hanging.execute(f"{IMPORTS}lock = threading.Lock()\ndef locked():\n    with lock:\n        pass", number=3).wait()
    start_cell(hanging, "if rank == 0:\n    lock.acquire()\n    locked()")
    found = verdict(hanging, "in locked, rank 1 does nothing")
    assert found == "no rank waits for another; rank 0 is at Cell In[3], line 4, in locked, rank 1 does nothing"


def test_a_rank_whose_process_is_stopped(hanging):
    """During a run; the others wait for it, after a step that is named."""
    x, y = classes()
    run = hanging.train(net(), (x, y), loss="cross_entropy", epochs=10**6, batch_size=16, background=True)
    until(lambda: run.progress.ranks[0].step > 1)
    os.kill(hanging.engines[1].pid, signal.SIGSTOP)
    found = verdict(hanging, "(SIGSTOP); rank 0 waits")
    assert found.startswith("rank 1 does nothing, for its process is stopped (SIGSTOP); rank 0 waits for it in ")
    assert hanging.where().ranks[0].step > 1
    run.stop(now=True)
    run.wait()


def test_a_rank_that_reads_data_for_ever(cluster):
    """The line of the user's dataset, during a run: the others wait for it."""
    mark = os.path.abspath(__file__)

    def loss(output, target):
        import time

        import torch.distributed as dist

        if dist.get_rank() == 1:
            time.sleep(1e4)
        return (output.sum(1) - target).square().mean()

    line = loss.__code__.co_firstlineno + 6
    x, y = classes()
    run = cluster.train(net(), (x, y.float()), loss=loss, epochs=1, batch_size=16, background=True)
    found = verdict(cluster, "in loss; rank 0 waits")
    assert found.startswith(f"rank 1 is at {mark}, line {line}, in loss; rank 0 waits for it in ")
    run.stop(now=True)
    run.wait()


def test_ranks_that_work_are_not_disturbed(cluster, tmp_path):
    """A run whose stacks are requested all the time gives the same numbers."""
    (x, y), gate = classes(), Gate(tmp_path, 5)

    def train():
        return cluster.train(net(), (x, y), loss="cross_entropy", epochs=30, batch_size=16, background=True,
                             lr_scheduler=gate)  # fmt: skip

    run = train()
    gate.wait(5, run=run)
    assert ENGINES == len(cluster.where().ranks)
    gate.open(5)
    while not run.ended:
        cluster.where()
    quiet = train()
    quiet.wait()
    assert [row["loss"] for row in run.history] == [row["loss"] for row in quiet.history]


def test_lost_ranks(hanging):
    """They are named, without waiting for their answer."""
    os.kill(hanging.engines[1].pid, signal.SIGKILL)
    until(lambda: hanging.engines[1].state == "lost")
    assert hanging.where().verdict == "rank 0 does nothing, rank 1 is lost (its process has ended)"
