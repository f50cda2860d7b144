"""Values of slices put together: tensors, arrays, lists with an entry for each sample, and nests of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nbdist.core.data.sample_rows import Rows, from_note, join, kept, pack_rows, to_note, unpack_rows, without_rowless
from nbdist.errors import TaskError


def rows(places, value):
    return Rows(places, (value,))


def joined(*parts):
    (value,) = join(parts, "outputs").values
    return value


def test_rows_come_into_the_order_of_their_places():
    """Whatever order the slices come in, and however a stream distributes them."""
    assert [0, 1, 2, 3, 4] == joined(rows(range(3, 5), torch.tensor([3, 4])), rows(range(3), torch.arange(3))).tolist()
    even, odd = rows(range(0, 5, 2), torch.tensor([0, 2, 4])), rows(range(1, 5, 2), torch.tensor([1, 3]))
    assert [0, 1, 2, 3, 4] == joined(odd, even).tolist()
    assert [0, 1, 2, 3, 4] == joined(rows(odd.places, np.array([1, 3])), rows(even.places, np.arange(0, 5, 2))).tolist()
    assert ["a", "b", "c"] == joined(rows(range(0, 3, 2), ["a", "c"]), rows(range(1, 2), ["b"]))


BOXES = [[torch.zeros(k, 4) for k in ks] for ks in ((3, 1), (2, 2), (1, 1, 5))]


def test_a_list_of_a_value_for_each_sample_is_lengthened():
    """As of boxes, of which each image has another number; a list of values with a row for each sample is not."""
    found = joined(*(rows(range(10 * i, 10 * i + len(boxes)), boxes) for i, boxes in enumerate(BOXES)))
    assert [3, 1, 2, 2, 1, 1, 5] == [len(one) for one in found]
    dicts = joined(rows(range(2), [{"a": 1}, {"a": 2}]), rows(range(2, 3), [{"a": 3}]))
    assert [{"a": 1}, {"a": 2}, {"a": 3}] == dicts
    layers = joined(
        rows(range(2), [torch.zeros(2), torch.ones(2, 3)]), rows(range(2, 5), [torch.zeros(3), torch.ones(3, 3)])
    )
    assert [(5,), (5, 3)] == [tuple(one.shape) for one in layers]
    with pytest.raises(
        TaskError, match="outputs are lists of 2 values of 2 rows, which may be one for each of 2 samples"
    ):
        joined(*(rows(range(i, i + 2), [torch.zeros(2), torch.ones(2)]) for i in (0, 2)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), r"outputs differ in shape from slice to slice, \(2, 3\) and \(2, 4\)"),
        ((torch.tensor(1), torch.tensor(2)), "outputs are numbers, without a row for each sample"),
        (({"a": 1}, {"b": 1}), "outputs differ in structure from slice to slice"),
        ((1, 2), "outputs are 1 and 2, without a row for each sample"),
        (([torch.zeros(1)] * 3, [torch.zeros(1)] * 4), "outputs differ in structure from slice to slice, a list of 3"),
    ],
)
def test_what_does_not_fit_together_is_refused(values, message):
    """In one sentence."""
    with pytest.raises(TaskError, match=message):
        joined(*(rows(range(2 * i, 2 * i + 2), value) for i, value in enumerate(values)))


NEST = {
    "scores": torch.ones(2, 3), "array": np.array([1.0, 2.0]), "texts": ["a", "b"], "none": None,
    "boxes": [{"box": torch.zeros(1, 4), "name": "cat"}, {"box": torch.zeros(2, 4), "name": "dog"}],
    "pair": (torch.tensor([1, 2], dtype=torch.bfloat16), torch.tensor([True, False])),
}  # fmt: skip


def assert_same(one, other):
    leaves, structure = torch.utils._pytree.tree_flatten(one)
    expected, of_expected = torch.utils._pytree.tree_flatten(other)
    assert of_expected == structure
    for leaf, value in zip(leaves, expected, strict=True):
        assert type(value) is type(leaf)
        assert (torch.equal if isinstance(leaf, torch.Tensor) else np.array_equal)(value, leaf)


def test_rows_are_sent_as_plain_data_and_tensors():
    """What arrives is equal, and has the classes of the receiver's own rows; without them, those of the note."""
    sent = rows(range(4, 6), NEST)
    note, tensors = pack_rows(sent, "outputs")
    arrived = unpack_rows(json.loads(json.dumps(note)), tensors, sent, "outputs")
    assert range(4, 6) == arrived.places
    assert_same(arrived.values[0], NEST)
    note, found = to_note(NEST, "outputs")
    assert_same(from_note(json.loads(json.dumps(note)), found), NEST)
    with pytest.raises(TaskError, match="outputs differ in structure"):
        unpack_rows(pack_rows(rows(range(2), {"other": 1}), "outputs")[0], [], sent, "outputs")


def test_what_cannot_be_sent_is_refused():
    """By its type."""
    with pytest.raises(TaskError, match="outputs hold a value of type object, which ranks cannot send to each other"):
        pack_rows(rows(range(1), [object()]), "outputs")


def test_what_is_kept_is_a_copy():
    """Without a graph."""
    tensor = torch.ones(2, requires_grad=True)
    copy = kept((tensor * 2, [tensor]))
    assert not copy[0].requires_grad
    with torch.no_grad():
        tensor.zero_()
    assert [1.0, 1.0] == copy[1][0].tolist()


def test_entries_without_rows_are_left_out_of_a_dict():
    """A loss, a cache; a dict of them alone stays, and is refused when it is put together."""
    found, names = without_rowless({"loss": torch.tensor(1), "y": torch.ones(2), "cache": object(), "no": None}, 2)
    assert (["y", "no"], ["loss", "cache"]) == (list(found), names)
    assert ({"loss": 1}, []) == without_rowless({"loss": 1}, 2)
