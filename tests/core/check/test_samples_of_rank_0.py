"""Data that rank 0 reads for all: parts by rank are found, and other differences do no harm."""

from __future__ import annotations

import os

import pytest
import torch
from problems import train
from torch.utils import data as torch_data

from nbdist.errors import TaskError

X = torch.arange(60.0, dtype=torch.float64).view(30, 2) / 30


class Part(torch_data.IterableDataset):
    """Made by each process for itself, as under torchrun."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks

    def __iter__(self):
        return ((x, x.sum(0, keepdim=True)) for x in X[self.rank :: self.ranks])


class Unseeded(Part):
    """In an order that nobody can repeat."""

    def __iter__(self):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big")))
        return ((X[i], X[i].sum(0, keepdim=True)) for i in order)


class Batches(Part):
    def __iter__(self):
        return ((x, x.sum(1, keepdim=True)) for x in X[self.rank :: self.ranks].split(5))


class Once(Unseeded):
    """Its own iterator, which is consumed."""

    def __init__(self, rank, ranks):
        super().__init__(rank, ranks)
        self.left = list(super().__iter__())

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop()


def trained(world, kind, check, parts=True):
    data = kind(*((world.rank, world.size) if parts else (0, 1)))
    data = data if kind is Batches else torch_data.DataLoader(data, batch_size=6)
    seen = []

    def step(model, batch):
        seen.extend(batch[0][:, 0].tolist())
        return (model(batch[0]) - batch[1]).square().mean()

    model = torch.nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.zero_()
    result, weights = train(world, model, data, step=step, optimizer="sgd", lr=0.1, check=check)
    return result.history[0]["samples"], weights["weight"].tolist(), seen


@pytest.mark.parametrize("check", ["yes", "no"])
@pytest.mark.parametrize("kind", [Part, Batches])
def test_a_part_by_rank_is_refused(run_ranks, kind, check):
    """Rank 0 reads for all, and would train on its part alone."""
    with pytest.raises(TaskError, match=r"rank 1 reads other samples .*, each time the same.* Give every process"):
        run_ranks(2, trained, kind, check)


@pytest.mark.parametrize("kind", [Unseeded, Once])
def test_a_stream_that_differs_from_process_to_process_is_read_once(run_ranks, kind):
    """Every sample of it, by rank 0; all ranks end with the same weights."""
    (samples, weights, first), (_, other, second) = run_ranks(2, trained, kind, "no")
    assert 30 == samples
    assert weights == other
    assert sorted(X[:, 0].tolist()) == sorted(first + second)


def test_a_whole_stream_is_not_refused(run_ranks):
    """The same on all processes."""
    assert 30 == run_ranks(3, trained, Part, "yes", False)[0][0]
