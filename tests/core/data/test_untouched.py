"""First samples are read from a copy: the user's own object stays closed, unread and uncounted."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch.utils import data as torch_data

from nbdist.core.data.sources import Source
from nbdist.core.data.untouched import untouched
from nbdist.core.task.task import Task

_opened = None


class Lazy(torch_data.Dataset):
    """Opens a file, counts reads and draws numbers."""

    def __init__(self):
        self.file, self.cache, self.reads = None, {}, 0
        self.generators = [torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)]
        self.lock, self.rows = threading.Lock(), torch.arange(8.0).view(4, 2)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        global _opened
        if self.file is None:
            self.file = _opened = self.cache["file"] = open(__file__)  # noqa: SIM115
        self.reads += 1
        self.generators[0].get_state()
        torch.rand((), generator=self.generators[0])
        self.generators[1].random()
        self.generators[2].random()
        with self.lock:
            return self.rows[i], self.rows[i].sum()


def state(data):
    torch_state, numpy_state, python_state = (
        data.generators[0].get_state(), data.generators[1].bit_generator.state, data.generators[2].getstate(),
    )  # fmt: skip
    return data.file, dict(data.cache), data.reads, torch_state.tolist(), numpy_state, python_state, _opened


FORMS = {
    "itself": lambda data: data,
    "a part": lambda data: torch_data.Subset(data, [2, 0]),
    "a nest": lambda data: torch_data.ConcatDataset([torch_data.Subset(data, [1]), data]),
    "a loader": lambda data: torch_data.DataLoader(data, batch_size=2),
    "batches": lambda data: torch_data.DataLoader(data, batch_sampler=[[0, 1], [2, 3]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_reading_a_first_sample_leaves_no_trace(form):
    """Nothing is opened, counted or drawn, in the object, in what it holds, or in a global of its module."""
    data = Lazy()
    before = state(data)
    source = Source.of(FORMS[form](data))
    assert 2 == len(source.first())
    assert before == state(data)
    Task.create(torch.nn.Linear(2, 1), FORMS[form](data), loss="mse")
    assert before == state(data)


def test_a_copy_shares_the_data():
    """Tensors and large containers are not copied."""
    data = Lazy()
    data.names = [str(i) for i in range(2000)]
    with untouched(data) as copied:
        assert copied is not data
        assert copied.rows is data.rows
        assert copied.names is data.names


class Fixed:
    """Cannot be copied."""

    def __copy__(self):
        raise TypeError("not this")

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.tensor(float(i)), i


def test_what_cannot_be_copied_is_read_itself():
    """There is no other way."""
    assert [[0.0], [0]] == [value.tolist() for value in Source.of(Fixed()).first()]
