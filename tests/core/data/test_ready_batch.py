"""How ready-made batches are cut: along their samples, or not at all."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.utils import rnn

from nbdist.core.data.ready_batch import BatchForm, looks_like_batch
from nbdist.errors import TaskError

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)


class Named(NamedTuple):
    x: Any
    texts: Any


@dataclasses.dataclass
class Record:
    x: Any
    split: str = "train"


class Encoding(collections.UserDict):
    pass


class Table:
    """An object that is cut by slicing, as tables of tensors are."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        return Table(self.values[rows])


def images(*heights):
    return [torch.full((3, height), float(height)) for height in heights]


def plain(value):
    """A batch as plain values."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (dict, collections.UserDict)):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Table):
        return plain(value.values)
    return plain(vars(value)) if dataclasses.is_dataclass(value) else value


CUT = {
    "a pair": ((X, Y), [X[1:3].tolist(), [1, 2]]),
    "a list of tensors": ([X, Y], [X[1:3].tolist(), [1, 2]]),
    "a tensor": (X, X[1:3].tolist()),
    "an array": (X.numpy(), X[1:3].tolist()),
    "a dict": ({"x": X, "n": torch.tensor(7), "name": "train"}, {"x": X[1:3].tolist(), "n": 7, "name": "train"}),
    "a mapping": (Encoding(x=X), {"x": X[1:3].tolist()}),
    "a named tuple": (Named(X, list("abcdef")), [X[1:3].tolist(), ["b", "c"]]),
    "a dataclass": (Record(X), {"x": X[1:3].tolist(), "split": "train"}),
    "a nest": (([X, Y], Y), [[X[1:3].tolist(), [1, 2]], [1, 2]]),
    "a table": ((Table(X), Y), [X[1:3].tolist(), [1, 2]]),
    "texts": ((list("abcdef"), Y), [["b", "c"], [1, 2]]),
    "images of other sizes": (
        (tuple(images(4, 5, 6, 7, 8, 9)), tuple({"boxes": torch.ones(i % 2 + 1, 4)} for i in range(6))),
        [plain(images(5, 6)), [{"boxes": torch.ones(2, 4).tolist()}, {"boxes": torch.ones(1, 4).tolist()}]],
    ),
    "images with labels": ((images(4, 5, 6, 7, 8, 9), Y), [plain(images(5, 6)), [1, 2]]),
    "a list of records": (
        [{"x": torch.ones(i + 1), "y": torch.ones(2)} for i in range(6)],
        [{"x": [1.0] * (i + 1), "y": [1.0, 1.0]} for i in (1, 2)],
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_a_batch_is_cut_along_its_samples(name):
    """Tensors, arrays, lists and tables by rows, structures keep their type, the rest is in each slice."""
    batch, expected = CUT[name]
    form = BatchForm.of(batch)
    assert 6 == form.samples(batch)
    part = form.take(batch, range(1, 3))
    assert type(batch) is type(part)
    assert expected == plain(part)


def test_rows_that_do_not_follow_each_other_are_taken_too():
    """As those of a synchronized BatchNorm in the check."""
    batch = Named(X, list("abcdef"))
    assert [X[[0, 3]].tolist(), ["a", "d"]] == plain(BatchForm.of(batch).take(batch, [0, 3]))


def test_a_slice_of_rows_is_a_view():
    """Nothing is copied to be cut."""
    assert X[2].data_ptr() == BatchForm.of((X, Y)).take((X, Y), range(2, 4))[0].data_ptr()


def test_the_form_of_the_first_batch_holds_for_all():
    """Where a smaller one could be read in another way: two pairs of inputs, or two samples."""
    form = BatchForm.of(([X, X], Y))
    assert [[[0.0, 1.0]], [[0.0, 1.0]]] == plain(form.take(([X[:2], X[:2]], Y[:2]), range(1))[0])


REFUSED = {
    "lengths": ((X, Y[:5]), r"do not share a first dimension \(their shapes are \(6, 2\), \(5,\)\)"),
    "packed": (
        rnn.pack_sequence([torch.ones(2, 3), torch.ones(1, 3)]),
        "is a PackedSequence, whose samples lie a",
    ),
    "an object": ((object(), Y), r"batch\[0\] is a value of type object"),
    "sparse": ((X.to_sparse(), Y), r"batch\[0\] is a tensor of layout torch.sparse_coo"),
    "two readings": (([X[:2], X[:2]], Y[:2]), "it may be read as 2 samples in more than one way"),
    "images of three channels": (images(4, 4, 4, 4, 4), "may be read as 3 or 5 samples in more than one way"),
    "records of three channels": ([{"image": one} for one in images(4, 5)], "as 2 or 3 samples in more than one way"),
    "only numbers": ({"n": 3}, r"it holds no tensor or list with samples \(a value of type dict\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_for_certain_is_one_sentence(name):
    """It says what is in the way, and three ways out."""
    batch, why = REFUSED[name]
    form = BatchForm.of(batch)
    assert 1 == form.samples(batch)
    with pytest.raises(TaskError, match=f"cannot be cut into slices, since .*{why}.*: give batches .* use one rank"):
        form.take(batch, range(1))


def test_parts_of_a_later_batch_that_disagree_are_named():
    """By their paths and lengths."""
    form = BatchForm.of({"ids": X, "labels": Y})
    with pytest.raises(TaskError, match=r"batch\['ids'\] has 6 samples, and batch\['labels'\] has 5"):
        form.samples({"ids": X, "labels": Y[:5]})
    with pytest.raises(TaskError, match=r"batch\['labels'\] is in the first batch of an epoch, but not in a later one"):
        form.samples({"ids": X})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((X, Y), True),
        ({"x": X, "y": Y}, True),
        ((X[0], 3), False),
        ((X[0], torch.tensor(3)), False),
        ((X[0], X[1]), False),
        ((X, Y[:5]), False),
    ],
)
def test_a_sample_differs_from_what_may_be_a_batch(value, expected):
    """A batch has tensors that share their first dimension, and one with another."""
    assert expected is looks_like_batch(value)
