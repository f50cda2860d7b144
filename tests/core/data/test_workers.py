"""Loading processes: their errors and their ends are the run's, and nothing waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from problems import alone, mlp, train
from shared_cluster import until
from torch.utils import data as torch_data

from nbdist.core.data.workers import worker_errors
from nbdist.errors import TaskError


class Failing(torch_data.Dataset):
    """Sample 7 cannot be read."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i == 7:
            raise ValueError("a torn page")
        return torch.ones(6, dtype=torch.float64), 1


class Dying(Failing):
    def __getitem__(self, i):
        if i == 7 and torch_data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(6, dtype=torch.float64), 1


class Stream(torch_data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (self.data[i] for i in range(12))


def collate_fails(samples):
    raise ValueError("a torn page")


FORMS = {
    "a data set": lambda data, workers: torch_data.DataLoader(data, batch_size=4, num_workers=workers),
    "a stream": lambda data, workers: torch_data.DataLoader(Stream(data), batch_size=4, num_workers=workers),
    "batches": lambda data, workers: torch_data.DataLoader(
        data, batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7]], num_workers=workers
    ),
    "ready batches": lambda data, workers: Own(data, batch_size=4, num_workers=workers),
    "a collate function": lambda data, workers: torch_data.DataLoader(
        data, batch_size=4, num_workers=workers, collate_fn=collate_fails
    ),
}


class Own(torch_data.DataLoader):
    def __iter__(self):
        yield from super().__iter__()


def fails(world, form, data, workers):
    model = torch.nn.Linear(6, 3).double()
    train(world, model, FORMS[form](data, workers), optimizer="sgd", lr=0.1, check="no")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_an_error_in_the_data_is_that_of_the_run(run_ranks, form, workers):
    """On two ranks, of which the other does not wait for ever: the user's error, with its text."""
    with pytest.raises(ValueError, match="a torn page"):
        run_ranks(2, fails, form, Failing(), workers)


@pytest.mark.parametrize("form", ["a data set", "a stream", "batches", "ready batches"])
def test_a_killed_loading_process_is_one_sentence(run_ranks, form):
    """As when memory runs out."""
    with pytest.raises(TaskError, match=r"a loading process \(pid \d+\) was (killed|ended).*use fewer num_work"):
        run_ranks(2, fails, form, Dying(), 1)


@pytest.mark.parametrize("form", ["a data set", "a stream"])
def test_an_interrupt_while_a_worker_starts_leaves_none(monkeypatch, form):
    """It comes once the worker is known to what ends it."""
    start = multiprocessing.process.BaseProcess.start

    def interrupted(process):
        start(process)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alone(mlp(), FORMS[form](Failing(), 1), loss="cross_entropy", check="no")
    until(lambda: not multiprocessing.active_children())


def test_the_sample_that_cannot_be_read_is_named():
    """In the traceback."""
    from nbdist.core.comm.world import World

    with pytest.raises(ValueError, match="a torn page") as caught:
        fails(World(), "a data set", Failing(), 0)
    assert ["while sample 7 of the data was read"] == getattr(caught.value, "__notes__", None)


def test_other_errors_are_left_as_they_are():
    """Only torch's own about its workers is another one."""
    with pytest.raises(RuntimeError, match="shapes"), worker_errors():
        raise RuntimeError("shapes")
