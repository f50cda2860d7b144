"""The forms of data: how each is read, and which are refused, by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils import data as torch_data

from nbdist.core.data.sources import Source, tensors_in
from nbdist.errors import TaskError

X, Y = torch.arange(20.0).view(10, 2), torch.arange(10)
BOTH = torch_data.TensorDataset(X, Y)


class Squares(torch_data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.tensor([float(i)]), i * i


class Stream(torch_data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


class SizedStream(Stream):
    def __len__(self):
        return 10


def read_only(array):
    array.flags.writeable = False
    return array


IN_MEMORY = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "read-only arrays": (read_only(X.numpy().copy()), read_only(Y.numpy().copy())),
    "arrays read backwards": (X.numpy()[::-1].copy()[::-1], Y.numpy()[::-1].copy()[::-1]),
    "a TensorDataset": BOTH,
    "a Subset of a Subset": torch_data.Subset(torch_data.Subset(BOTH, list(range(10))[::-1]), list(range(10))[::-1]),
    "a loader": torch_data.DataLoader(BOTH, batch_size=4),
}


@pytest.mark.parametrize("form", IN_MEMORY)
def test_data_in_memory_is_kept_as_tensors(form):
    """Tensors and arrays, also in TensorDataset and Subset, are read by index, never one sample at a time."""
    source = Source.of(IN_MEMORY[form])
    assert source.dataset is None
    rows = slice(None) if source.indices is None else source.indices
    for expected, tensor in zip((X, Y), tensors_in(source.tensors), strict=True):
        assert torch.equal(expected, tensor[rows])
    assert 10 == source.samples
    assert [[[0.0, 1.0]], [0]] == [tensor.tolist() for tensor in source.first()]


def test_writable_arrays_are_not_copied():
    """An array that torch can share is not copied."""
    array = np.zeros((4, 2))
    assert array.ctypes.data == Source.of(array).tensors.data_ptr()


def test_a_dict_of_tensors_stays_a_dict():
    """The step's batch has the same keys."""
    source = Source.of({"x": X, "y": Y.numpy()})
    assert {"x": [[0.0, 1.0]], "y": [0]} == {key: tensor.tolist() for key, tensor in source.first().items()}


@pytest.mark.parametrize(
    ("data", "form", "samples"),
    [
        (Squares(), "dataset", 10),
        ([(1.0, 2), (3.0, 4)], "dataset", 2),
        (torch_data.Subset(Squares(), [1, 2, 3]), "dataset", 3),
        (torch_data.ConcatDataset([BOTH, BOTH]), "dataset", 20),
        (Stream(), "stream", None),
        (SizedStream(), "stream", 10),
        (torch_data.DataLoader(Stream(), batch_size=2), "stream", None),
    ],
)
def test_other_data_is_read_through_a_loader(data, form, samples):
    """Anything with a length and items is map-style, an IterableDataset is a stream."""
    source = Source.of(data)
    assert [form] == [f for f in ("tensors", "dataset", "stream") if getattr(source, f) is not None]
    assert samples == source.samples


def collate(samples):
    return samples


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (torch_data.DataLoader(BOTH, batch_size=4), (4, False, False)),
        (torch_data.DataLoader(BOTH, batch_size=4, shuffle=True, drop_last=True), (4, True, True)),
        (torch_data.DataLoader(BOTH, sampler=torch_data.SubsetRandomSampler([1, 3])), (1, None, False)),
        (torch_data.DataLoader(Stream(), batch_size=4), (4, None, False)),
    ],
)
def test_a_loader_brings_its_settings(loader, expected):
    """Its batch size is the global one; its shuffle and its drop_last are kept."""
    source = Source.of(loader)
    assert expected == (source.batch_size, source.shuffle, source.drop_last)


def test_a_loader_with_a_collate_of_its_own_is_not_read_by_index():
    """The batch is what collate_fn returns."""
    source = Source.of(torch_data.DataLoader(BOTH, batch_size=4, collate_fn=collate, num_workers=1, timeout=9))
    assert BOTH is source.dataset
    assert collate is source.collate
    assert (1, 9) == (source.loading["num_workers"], source.loading["timeout"])


def batches_of(*, cls=torch_data.BatchSampler):
    return cls(torch_data.SequentialSampler(BOTH), 2, False)


class Bucketed(torch_data.BatchSampler):
    pass


class Endless(torch_data.Sampler):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"train_set is None, not data: give a Dataset, a DataLoader, or a tuple of tensors or NumPy arrays\."),
        ("digits", "train_set is a value of type str, not data"),
        (3, "train_set is a value of type int, not data"),
        ((), "train_set is empty: give a Dataset"),
        ((X[:0], Y[:0]), r"train_set is empty: there is no sample to train on\."),
        ([], "train_set is empty: there is no sample"),
        ((X, 3), "train_set holds a value of type int"),
        ((X, torch.tensor(1)), "train_set holds a scalar, which has no samples"),
        ((X, Y[:9]), r"the tensors of train_set differ in their number of samples, \[10, 9\]: make them equal"),
        (torch_data.DataLoader(BOTH, batch_sampler=batches_of(cls=Bucketed)), "train_set .*with Bucketed, whose batc"),
        (torch_data.DataLoader(BOTH, batch_size=None), "train_set .*with batch_size=None, .*give it a batch_size"),
        (
            torch_data.DataLoader(BOTH, sampler=torch_data.DistributedSampler(BOTH, num_replicas=2, rank=0)),
            "train_set uses a DistributedSampler, but nbdist distributes the samples itself: omit it",
        ),
        (torch_data.DataLoader(BOTH, sampler=Endless()), "uses Endless, a sampler without a length: give it a __len__"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_out_is_refused(data, message):
    """The error names the argument, its type, and what to give instead."""
    with pytest.raises(TaskError, match=message):
        Source.of(data, "train_set")
