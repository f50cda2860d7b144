"""Runs of a user's sampler: the same keys after a resume, whatever is drawn meanwhile."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils import data as torch_data

from nbdist.core.data.sampler_runs import SamplerRuns
from nbdist.core.data.sources import Source

ROWS = [(torch.tensor(float(i)), i) for i in range(10)]


class Own(torch_data.Sampler):
    """Draws from its own generator, and from torch's as it goes."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(2)

    def __iter__(self):
        for i in torch.randperm(10, generator=self.generator).tolist():
            yield i + 10 * int(torch.randint(5, ()))


class Informed(torch_data.Sampler):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([self.epoch])


def runs(sampler, **loader):
    in_batches = isinstance(sampler, torch_data.BatchSampler)
    options = {"batch_sampler": sampler} if in_batches else {"batch_size": 4, "sampler": sampler}
    source = Source.of(torch_data.DataLoader(ROWS, **options, **loader))
    return SamplerRuns(source, 4, seed=1)


def keys(blocks):
    return [batch for block in blocks for batch in block]


def test_an_epoch_is_the_same_without_the_earlier_ones():
    """After a resume earlier epochs run too, since a sampler may have its own generator."""
    first, resumed = runs(Own()), runs(Own())
    epochs = [keys(first.blocks(epoch)) for epoch in (1, 2, 3)]
    assert 3 == len({str(epoch) for epoch in epochs})
    assert epochs[2] == keys(resumed.blocks(3))


def test_the_keys_do_not_depend_on_what_steps_draw():
    """A sampler without an end is drawn as the run goes on."""
    alone = keys(itertools.islice(runs(Endless()).blocks(1), 3))
    disturbed = []
    for block in itertools.islice(runs(Endless()).blocks(1), 3):
        disturbed += block
        torch.rand(3)
    assert alone == disturbed
    assert 3 * 64 == len(alone)


class Endless(torch_data.Sampler):
    def __iter__(self):
        while True:
            yield int(torch.randint(10, ()))


@pytest.mark.parametrize("nested", [False, True])
def test_a_sampler_gets_the_epoch(nested):
    """Counted from 0, as users of a DistributedSampler do, also inside of a batch sampler."""
    drawn = runs(torch_data.BatchSampler(Informed(), 4, False) if nested else Informed())
    assert [[[0]], [[1]]] == [keys(drawn.blocks(epoch)) for epoch in (1, 2)]


class Vague(Informed):
    def __len__(self):
        raise ValueError("ambiguous")


def test_a_sampler_may_say_in_any_way_that_it_has_no_length():
    """Then the number of steps is not known."""
    assert Source.of(torch_data.DataLoader(ROWS, sampler=Vague(), batch_size=4)).samples is None


def test_the_last_batch_is_dropped_where_the_loader_drops_it():
    """Of a sampler; a batch sampler decides by itself."""
    assert [4, 4] == [len(batch) for batch in keys(runs(list(range(10)), drop_last=True).blocks(1))]
    assert [4, 4, 2] == [len(batch) for batch in keys(runs(list(range(10))).blocks(1))]
