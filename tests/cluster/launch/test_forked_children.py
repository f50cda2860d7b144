"""Forked children of the kernel do not end its engines."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest
import torch
from shared_cluster import of_cluster
from torch.utils.data import DataLoader, TensorDataset

from nbdist.cluster import current_cluster, current_server
from nbdist.errors import ClusterError

pytestmark = [
    pytest.mark.engines,
    pytest.mark.programs,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks"),
]


def in_child(work):
    """What a forked child returns that runs a function and then exits with all its exit handlers."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(theirs, repr(work()).encode())
            import atexit

            atexit._run_exitfuncs()
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        result = file.read().decode()
    os.waitpid(child, 0)
    return result


@pytest.fixture
def whole(cluster):
    """The cluster; all its processes must be alive afterwards, and work."""
    before = {process.pid for process in of_cluster(cluster)[0]}
    server = current_server()
    yield cluster
    assert before <= {process.pid for process in of_cluster(cluster)[0] if process.is_running()}
    assert server is current_server()
    cell = cluster.execute("print(rank)")
    cell.wait()
    assert {0: "0\n", 1: "1\n"} == cell.printed()
    cluster.push(word=1)
    assert 1 == cluster.pull("word")


def test_a_child_that_ends_ends_no_engines(whole):
    """Its exit handlers are copies of the kernel's."""
    assert "None" == in_child(lambda: None)


def test_a_child_that_stops_the_cluster_ends_no_engines(whole):
    """As it does at the end of a `with` block."""
    assert "None" == in_child(whole.stop)


def test_a_child_has_no_cluster_and_no_fork_server(whole):
    """So the child never uses the kernel's."""
    assert "(None, None)" == in_child(lambda: (current_cluster(), current_server()))


def test_a_child_that_uses_the_engines_is_refused(whole):
    """Instead of writing to the kernel's connections."""

    def use():
        with pytest.raises(ClusterError) as error:
            whole.execute("1")
        return str(error.value)

    assert f"'the engines belong to process {os.getpid()}, and this is a fork of it: use them there.'" == in_child(
        use
    ).replace('"', "'")


def test_data_workers_of_the_kernel_end_no_engines(whole):
    """Forked by torch, by multiprocessing, or by hand."""
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert 28 == sum(int(batch.sum()) for (batch,) in loader)
    worker = multiprocessing.get_context("fork").Process(target=sys.exit)
    worker.start()
    worker.join()
