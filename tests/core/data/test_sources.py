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
    assert [form] == [f for f in ("tensors", "dataset", "stream", "ready") if getattr(source, f) is not None]
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


class Replicated(torch_data.Sampler):
    num_replicas, rank = 2, 0

    def __iter__(self):
        return iter([[0, 2], [4, 6]])


class Frame:
    """The form of a data frame."""

    columns = ("x", "y")

    def to_numpy(self):
        return X.numpy()


class Doubled(torch_data.DataLoader):
    def __iter__(self):
        return ((2 * x, y) for x, y in super().__iter__())


class Named(torch_data.DataLoader):
    """A subclass that reads as torch does."""

    def __init__(self, dataset):
        super().__init__(dataset, batch_size=4)


class Batches:
    def __iter__(self):
        return iter([(X, Y)])


class Pipeline(torch_data.IterableDataset):
    """Passes the batches of a loader on."""

    def __init__(self):
        self.stages = [torch_data.DataLoader(BOTH, batch_size=5)]

    def __iter__(self):
        return iter(self.stages[0])


def buckets():
    return torch_data.BatchSampler(torch_data.SequentialSampler(BOTH), 2, False)


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (torch_data.DataLoader(BOTH, batch_size=None), "ready"),
        (torch_data.DataLoader([(X, Y)], batch_size=None), "ready"),
        (torch_data.DataLoader(Stream(), batch_size=None), "ready"),
        (Doubled(BOTH, batch_size=4), "ready"),
        (Batches(), "ready"),
        (Pipeline(), "ready"),
        (Named(BOTH), "tensors"),
        (torch_data.DataLoader(BOTH, batch_sampler=buckets()), "dataset"),
        ([torch.ones(3)] * 9, "dataset"),
    ],
)
def test_what_gives_batches_is_known_from_what_gives_samples(data, form):
    """A loader that reads in its own way, one without a batch size, and whatever can only be iterated."""
    source = Source.of(data)
    assert [form] == [f for f in ("tensors", "dataset", "stream", "ready") if getattr(source, f) is not None]


def test_a_list_of_what_may_be_batches_is_one_of_samples_if_a_batch_size_says_so():
    """As sequences with a label for each element are."""
    assert 3 == Source.of([(X, Y)] * 3, batch_size=2).samples


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
        (
            torch_data.DataLoader(BOTH, sampler=torch_data.DistributedSampler(BOTH, num_replicas=2, rank=0)),
            "train_set uses a DistributedSampler, but nbdist distributes the samples itself: omit it",
        ),
        (torch_data.DataLoader(BOTH, batch_sampler=Replicated()), "a Replicated for one of 2 replicas.*replicas=1"),
        ((batch for batch in [X]), "train_set is a generator, which can be read only once: give a list, or an object"),
        (map(abs, [1]), "train_set is a map, which can be read only once"),
        ({(X, Y)}, "train_set is a value of type set, not data"),
        ({}.values(), "train_set is a value of type dict_values, not data"),
        (
            {"train": torch_data.TensorDataset(X), "test": torch_data.TensorDataset(X)},
            r"train_set\['train'\] is a value of type TensorDataset, .*: give train_set\['train'\] if it is a data set",
        ),
        ({0: X, 1: X}, r"train_set is a dict by a value of type int: .* give list\(train_set.values\(\)\)"),
        ([X, Y], "train_set is a list of 2 tensors of 10 rows each: give a tuple if they are inputs and targets"),
        ([(X, Y)] * 3, r"a list of 3 items, which may be batches .* or DataLoader\(train_set, batch_size=None\) if"),
        ({"x": np.array(["a", "b"])}, "train_set holds an array of <U1, which no tensor can be"),
        (Frame(), r"train_set is a Frame, .* give arrays, as in \(train_set\[inputs\].to_numpy"),
    ],
)  # fmt: skip
def test_what_cannot_be_dealt_out_is_refused(data, message):
    """The error names the argument, its type, and what to give instead."""
    with pytest.raises(TaskError, match=message):
        Source.of(data, "train_set")
