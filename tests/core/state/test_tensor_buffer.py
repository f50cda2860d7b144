"""Images: what is laid out in memory is a safetensors file, and comes back to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from problems import assert_same_bits
from safetensors.torch import load

from nbdist.core.state.snapshot import SnapshotBuffer, SnapshotStore
from nbdist.core.state.tensor_buffer import TensorBuffer, TensorLayout
from nbdist.errors import TaskError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture
def slot():
    """Memory that an image can lie in."""
    snapshot_store = SnapshotStore(1)
    yield SnapshotBuffer(snapshot_store.paths[0][0])
    snapshot_store.close()


def put(slot, tensors, text="text"):
    """Lay tensors out in a slot; the image of them."""
    slot.write((1, 0), 1, TensorLayout(tensors), tensors, text)
    return slot.image


def some():
    """Tensors of every dtype, with odd lengths, so that alignment is somebody's work."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        raw = torch.randint(0, 2, (dtype.itemsize * (2 * i + 3),), generator=generator, dtype=torch.uint8)
        tensors[f"{dtype}|é\\"] = raw.view(dtype)
    return tensors


def bits(tensors):
    return {key: tensor.contiguous().view(-1).view(torch.uint8) for key, tensor in tensors.items()}


def test_every_dtype_comes_back(slot):
    """To the bit, from memory and through safetensors' own reader, under names of any kind."""
    tensors = some()
    image = put(slot, tensors)
    there = TensorBuffer(image)
    assert "text" == there.text
    assert {*tensors} == {*there.keys}
    assert_same_bits(bits(tensors), bits({key: there.read(key) for key in there.keys}))
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {key: there.shape(key) for key in there.keys}
    assert_same_bits(bits(tensors), bits(load(image.numpy().tobytes())))


def test_shapes_and_layouts_come_back(slot):
    """Scalars, nothing at all, transposed, expanded, channels last."""
    tensors = {
        "scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "turned": torch.arange(6).view(2, 3).t(),
        "same": torch.tensor([1.0]).expand(3, 2), "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip
    there = TensorBuffer(put(slot, tensors))
    assert_same_bits(tensors, {key: there.read(key) for key in there.keys})


def test_nothing_but_a_text(slot):
    """A rank that keeps no tensor still tells what it knows."""
    there = TensorBuffer(put(slot, {}, text='"quotes" and é'))
    assert ([], '"quotes" and é') == (there.keys, there.text)


def test_what_it_holds_stays_where_it_is_as_the_text_grows(slot):
    """A header grows in steps, so the places of tensors mostly need not be worked out anew."""
    tensors = {"a": torch.arange(10)}
    lengths = set()
    for words in range(0, 3000, 100):
        image = put(slot, tensors, text="x" * words)
        lengths.add(len(image))
        assert_same_bits(tensors, {"a": TensorBuffer(image).read("a")})
    assert {0} == {(length - 80) % 4096 for length in lengths}
    assert len(lengths) <= 2


def test_a_layout_fits_the_same_shapes_only():
    """Of the same keys, in the same order."""
    layout = TensorLayout({"a": torch.zeros(2), "b": torch.zeros(3)})
    assert layout.fits({"a": torch.ones(2), "b": torch.ones(3)})
    for other in (
        {"a": torch.zeros(2)}, {"b": torch.zeros(3), "a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(3)},
        {"a": torch.zeros(2).double(), "b": torch.zeros(3)},
    ):  # fmt: skip
        assert not layout.fits(other)


def test_a_dtype_that_cannot_be_kept():
    """It is named with the tensor."""
    with pytest.raises(TaskError, match=r"first.weight is of torch.complex128, which cannot be kept"):
        TensorLayout({"first.weight||whole|0|0": torch.zeros(1, dtype=torch.complex128)})


def test_the_header_is_json_behind_its_length():
    """As safetensors has it."""
    header = TensorLayout({"a": torch.zeros(2, 3)}).header("text")
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length
    assert {"__metadata__": {"nbdist": "text"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}} == (
        json.loads(header[8:])
    )
