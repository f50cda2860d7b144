"""Runs on data that rank 0 reads for all: stopped, resumed, on other numbers of ranks, evaluated."""

from __future__ import annotations

import pytest
import torch
from problems import CLASSES, FEATURES, SGD, assert_same_bits, classes, mlp, stop_after, train
from torch.utils import data as torch_data

X, Y = classes(29)


class Rows(torch_data.Dataset):
    """With noise."""

    def __len__(self):
        return 29

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.rand(FEATURES, dtype=torch.float64), Y[i]


class Stream(torch_data.IterableDataset):
    """Draws order and noise from torch's generator."""

    def __iter__(self):
        return (Rows()[i] for i in torch.randperm(29).tolist())


class Ready(torch_data.DataLoader):
    def __iter__(self):
        return ((2 * x, y) for x, y in super().__iter__())


class Buckets(torch_data.Sampler):
    """Batches of 3 to 8, from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(2)

    def __iter__(self):
        order = torch.randperm(29, generator=self.generator)
        return iter([rows.tolist() for rows in order.split([3, 8, 5, 6, 7])])


DATA = {
    "stream": lambda: torch_data.DataLoader(Stream(), batch_size=8),
    "stream, workers": lambda: torch_data.DataLoader(Stream(), batch_size=8, num_workers=2),
    "batches": lambda: Ready(Rows(), batch_size=8, shuffle=True),
    "buckets": lambda: torch_data.DataLoader(Rows(), batch_sampler=Buckets()),
    "buckets, a worker": lambda: torch_data.DataLoader(Rows(), batch_sampler=Buckets(), num_workers=1),
}


def run(world, form, epochs=2, **options):
    result, weights = train(world, mlp(), DATA[form](), optimizer=SGD, epochs=epochs, **options)
    return result.state, [(row["steps"], row["samples"]) for row in result.history], weights


@pytest.mark.parametrize("form", DATA)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(run_ranks, form, tmp_path):
    """Stopped in the second epoch, on two ranks; batches that were read are skipped."""
    expected = run_ranks(2, run, form)[0]
    folder = str(tmp_path)
    assert "stopped" == run_ranks(2, stopped, form, folder)[0][0]
    resumed = run_ranks(2, resume, form, folder)[0]
    assert expected[1] == resumed[1]
    assert_same_bits(expected[2], resumed[2])


def stopped(world, form, folder):
    return run(world, form, commands=stop_after(6), checkpoint=folder)


def resume(world, form, folder):
    return run(world, form, resume=folder)


@pytest.mark.parametrize("form", ["stream", "batches", "buckets"])
def test_reproducible_runs_do_not_depend_on_the_number_of_ranks(run_ranks, form):
    """Noise, slices and order are those of one process."""
    expected = run_ranks(1, reproducible, form)[0]
    for size in (2, 3):
        for result in run_ranks(size, reproducible, form):
            assert_same_bits(expected[2], result[2])
            assert expected[1] == result[1]


def reproducible(world, form):
    return run(world, form, reproducible=4)


@pytest.mark.parametrize("form", ["stream", "batches", "buckets"])
def test_validation_data_that_rank_0_reads_is_measured_once(run_ranks, form):
    """Each sample counts once, whatever the number of ranks."""
    expected = run_ranks(1, validated, form)[0]
    for size in (2, 3):
        assert all(expected == pytest.approx(result, rel=1e-9) for result in run_ranks(size, validated, form))


PLAIN = {
    "stream": lambda: torch_data.DataLoader(InOrder(), batch_size=8),
    "batches": lambda: Ready(torch_data.TensorDataset(X, Y), batch_size=8),
    "buckets": lambda: torch_data.DataLoader(torch_data.TensorDataset(X, Y), batch_sampler=Buckets()),
}


class InOrder(torch_data.IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def validated(world, form):
    result, _ = train(world, mlp(), (X, Y), optimizer=SGD, val=PLAIN[form](), metric="accuracy", shuffle=False)
    row = result.history[0]
    assert CLASSES > 1
    return [row["val_loss"], row["val_accuracy"]]
