"""Distributed reading: with any number of ranks the slices are those of one process."""

from __future__ import annotations

import os
import random
from collections import Counter
from multiprocessing import queues, reduction

import numpy as np
import pytest
import torch
from problems import CLASSES, FEATURES, SGD, alone, assert_same_bits, mlp, train
from torch.utils import data as torch_data

from nbdist.core.comm import SoloChannel
from nbdist.core.comm.world import World
from nbdist.core.data.feed import Feed
from nbdist.core.data.reader import Reader
from nbdist.core.data.sources import Source
from nbdist.core.data.workers import EndsWithRank
from nbdist.errors import PlanError

SAMPLES, BATCH = 23, 8  # three batches, the last one of seven
NUMBERS = torch.arange(SAMPLES)


class Augmented(torch_data.Dataset):
    """Every sample is its index and random numbers from torch, NumPy and `random`."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return i, torch.rand(()).item(), float(np.random.rand()), random.random()


class Stream(torch_data.IterableDataset):
    """Numbers with noise; without a length."""

    def __init__(self, samples=SAMPLES):
        self.samples = samples

    def __iter__(self):
        return ((i, torch.rand(()).item()) for i in range(self.samples))


class Once(torch_data.IterableDataset):
    """Can be read only once, like a file handle or a generator."""

    def __init__(self, samples):
        self.samples = iter(samples)

    def __iter__(self):
        return self.samples


def doubled(samples):
    return 2 * torch.tensor(samples)


def weighted():
    generator = torch.Generator().manual_seed(0)
    return torch_data.WeightedRandomSampler(torch.rand(SAMPLES, generator=generator).tolist(), 19)


DATA = {
    "tensors": lambda: (NUMBERS, NUMBERS.double()),
    "a dict": lambda: {"x": NUMBERS},
    "a split": lambda: torch_data.random_split(
        torch_data.TensorDataset(NUMBERS), [9, 14], torch.Generator().manual_seed(0)
    )[1],
    "a data set": Augmented,
    "workers": lambda: torch_data.DataLoader(Augmented(), batch_size=BATCH, shuffle=True, num_workers=2),
    "in order": lambda: torch_data.DataLoader(Augmented(), batch_size=BATCH),
    "drop_last": lambda: torch_data.DataLoader(Augmented(), batch_size=BATCH, drop_last=True),
    "collate": lambda: torch_data.DataLoader(NUMBERS.tolist(), batch_size=BATCH, collate_fn=doubled),
    "a sampler": lambda: torch_data.DataLoader(Augmented(), batch_size=BATCH, sampler=weighted()),
    "a sampler over tensors": lambda: torch_data.DataLoader(
        torch_data.TensorDataset(NUMBERS), batch_size=BATCH, sampler=weighted()
    ),
}


def read(world, form, slices=0, seed=7):
    """Two epochs: for each step of each the slices of this rank, as plain values."""
    source = Source.of(DATA[form]())
    shuffle = True if source.shuffle is None else source.shuffle
    feed = Feed(world, range(world.size))
    reader = Reader(source, world.channel(), batch_size=BATCH, slices=slices, seed=seed, shuffle=shuffle, feed=feed)
    epochs = [[[(s.index, s.samples, plain(s.batch)) for s in step] for step in reader.epoch(e)] for e in (1, 2)]
    world.channel().all_reduce_(torch.ones(1))  # as each step: no rank leaves before the others have read
    reader.close()
    assert len(epochs[0]) == reader.steps
    return epochs


def plain(batch):
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return batch.tolist() if isinstance(batch, torch.Tensor) else [plain(value) for value in batch]


def numbers(slices):
    """The numbers of the samples in some slices."""
    columns = [next(iter(batch.values())) if isinstance(batch, dict) else batch[0] for _, _, batch in slices]
    return [number for column in columns for number in column]


@pytest.mark.parametrize("form", DATA)
def test_ranks_read_the_slices_of_one_process(run_ranks, form):
    """Samples, their order, slices and random numbers do not depend on the number of ranks."""
    for size in (2, 3, 4):
        expected = read(World(), form, slices=size)
        ranks = run_ranks(size, read, form)
        for epoch in range(2):
            for step, slices in enumerate(expected[epoch]):
                assert slices == [part for rank in ranks for part in rank[epoch][step]]


@pytest.mark.parametrize("form", ["tensors", "a dict", "a data set", "workers", "in order"])
def test_an_epoch_holds_every_sample_once(form):
    """Every sample is read once, and the last batch is the short one."""
    for epoch in read(World(), form, slices=4):
        assert [8, 8, 7] == [sum(samples for _, samples, _ in step) for step in epoch]
        assert list(range(SAMPLES)) == sorted(number for step in epoch for number in numbers(step))


@pytest.mark.parametrize("form", ["tensors", "a data set", "a sampler", "a split"])
def test_the_order_is_a_function_of_seed_and_epoch(form):
    """The sample order depends on epoch and seed only, not on the state of the generators."""
    first = read(World(), form)
    torch.rand(1)
    assert first == read(World(), form)
    other = read(World(), form, seed=8)
    permutations = [[number for step in epoch for number in numbers(step)] for epoch in (*first, *other)]
    assert 4 == len(set(map(tuple, permutations)))


def test_workers_draw_the_same_random_numbers():
    """Augmentation in worker processes gives the same samples as without workers."""
    assert read(World(), "a data set") == read(World(), "workers")


def test_a_loader_keeps_its_order_and_drops_its_last_batch():
    """Without shuffle the order is the data set's; with drop_last a short batch is never read."""
    for epoch in read(World(), "in order"):
        assert list(range(SAMPLES)) == [number for step in epoch for number in numbers(step)]
    assert [[8, 8], [8, 8]] == [[samples for ((_, samples, _),) in epoch] for epoch in read(World(), "drop_last")]


def test_collate_makes_the_batch():
    """The step gets what the loader's collate_fn returns."""
    (_, _, batch), = read(World(), "collate")[0][0]  # fmt: skip
    assert list(range(0, 16, 2)) == batch


def test_a_sampler_decides_how_often_a_sample_comes():
    """A WeightedRandomSampler runs on rank 0 only, and its order is distributed, with its length and repetitions."""
    drawn = Counter(number for step in read(World(), "a sampler")[0] for number in numbers(step))
    assert 19 == drawn.total()
    assert max(drawn.values()) > 1


def test_the_callers_random_numbers_are_left_alone():
    """Training uses its own seeds, and restores the states of torch, NumPy and `random`."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    data = torch_data.DataLoader(Samples(), batch_size=6)
    alone(mlp(dropout=0.5), data, optimizer=SGD)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


class Samples(torch_data.Dataset):
    """Samples to train on, with noise."""

    def __len__(self):
        return 13

    def __getitem__(self, i):
        return torch.full((FEATURES,), i / 13, dtype=torch.float64) + 0.1 * torch.rand(1), i % CLASSES


def list_of_samples():
    return [Samples()[i] for i in range(13)]


class SampleStream(torch_data.IterableDataset):
    """`Samples` one by one; `of_rank` shortens the stream by as many samples as the rank's number."""

    def __init__(self, of_rank=0):
        self.of_rank = of_rank

    def __iter__(self):
        return iter(list_of_samples()[: 13 - self.of_rank])


def read_stream(world, samples, per_rank):
    feed = Feed(world, range(world.size))
    reader = Reader(Source.of(Stream(samples)), world.channel(), batch_size=6, slices=per_rank * world.size, feed=feed)
    steps = [[(part.index, part.batch[0].tolist()) for part in step] for step in reader.epoch(1)]
    world.channel().all_reduce_(torch.ones(1))
    return steps


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 6, 23])
def test_the_batches_of_a_stream_are_cut_as_others_are(run_ranks, size, samples):
    """Rank 0 reads six samples at a time, and each rank gets a part of them, cut into microbatches."""
    ranks = run_ranks(size, read_stream, samples, 2)
    for step in range(-(-samples // 6)):
        parts = [part for rank in ranks for part in rank[step]]
        assert sorted(parts) == parts
        assert list(range(6 * step, min(6 * step + 6, samples))) == [i for _, part in parts for i in part]
    assert {-(-samples // 6)} == {len(steps) for steps in ranks}


def train_on_stream(world, accumulate=1, uneven=False, **options):
    data = torch_data.DataLoader(SampleStream(world.rank if uneven else 0), batch_size=6)
    return train(world, mlp(), data, optimizer=SGD, accumulate=accumulate, **options)


def test_a_stream_without_a_length_ends_cleanly(run_ranks):
    """All ranks notice the end of an epoch; replicas are equal and every sample was read."""
    results = run_ranks(3, train_on_stream)
    assert [(1, 3, 13)] == [(r["epoch"], r["steps"], r["samples"]) for r in results[0][0].history]
    for _, weights in results[1:]:
        assert_same_bits(results[0][1], weights)


def train_on_uneven_streams(world):
    return train_on_stream(world, uneven=True, epochs=2)


def test_streams_of_other_lengths_end_together(run_ranks):
    """Of streams of 13, 12 and 11 samples rank 0's is read to its end, and the next epoch begins together."""
    results = run_ranks(3, train_on_uneven_streams)
    assert [(3, 13)] * 2 == [(row["steps"], row["samples"]) for row in results[0][0].history]
    for _, weights in results[1:]:
        assert_same_bits(results[0][1], weights)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("steps", "samples"), [(2, 12), (3, 13), (5, 25)])
def test_steps_wrap_round_the_data(run_ranks, size, steps, samples):
    """With a number of steps, a run reads the data as often as needed, and has one row of history."""
    for result, _ in run_ranks(size, train_some_steps, steps):
        assert [(1, steps, samples)] == [(r["epoch"], r["steps"], r["samples"]) for r in result.history]
        assert "finished" == result.state


def train_some_steps(world, steps):
    data = torch_data.DataLoader(SampleStream(), batch_size=6)
    stream = train(world, mlp(), data, optimizer=SGD, steps=steps)
    indexed = train(world, mlp(), Samples(), optimizer=SGD, steps=steps, batch_size=6)
    assert stream[0].history[0]["samples"] == indexed[0].history[0]["samples"]
    return indexed


@pytest.mark.parametrize("options", [{"epochs": 2}, {"steps": 5}])
def test_a_stream_that_can_be_read_only_once_is_named(options):
    """A second epoch without samples raises, instead of training on nothing."""
    data = torch_data.DataLoader(Once(list_of_samples()), batch_size=6)
    with pytest.raises(PlanError, match=r"the data gave no batch in epoch 2: can it be read only once\?"):
        alone(mlp(), data, optimizer=SGD, **options)


def test_a_batch_that_drop_last_never_fills_is_named():
    """With drop_last and less than one batch of data there is nothing to train on."""
    data = torch_data.DataLoader(Samples(), batch_size=20, drop_last=True)
    with pytest.raises(PlanError, match="drop_last leaves no batch of 20: use a smaller batch size"):
        alone(mlp(), data)


def test_the_length_of_a_pass_is_known_where_the_data_has_one():
    """Steps are counted for a progress bar; a stream has none."""
    channel = SoloChannel(torch.device("cpu"))
    assert 3 == Reader(Source.of(NUMBERS), channel, batch_size=BATCH).steps
    assert Reader(Source.of(Stream()), channel, batch_size=BATCH).steps is None


def test_a_loading_process_does_not_begin_without_its_rank():
    """torch's worker does not notice a rank that was killed right after the fork."""
    first = EndsWithRank(None)
    first._rank_pid = 0  # no process's
    child = os.fork()
    if child == 0:
        first(0)
        os._exit(0)
    assert 1 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_the_user_has_a_loading_process_do_is_done(monkeypatch):
    """It is called with the worker's number."""
    monkeypatch.setattr(
        reduction.ForkingPickler, "reducer_override", None, raising=False
    )  # put back: this is no worker
    monkeypatch.setattr(queues.Queue, "_on_queue_feeder_error", queues.Queue._on_queue_feeder_error)
    done = []
    first = EndsWithRank(done.append)
    first._rank_pid = os.getppid()
    first(3)
    assert [3] == done
