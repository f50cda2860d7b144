"""Tensor buffers: the memory is a valid safetensors file, and every bit is read back."""

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
def buffer():
    """A snapshot buffer."""
    snapshot_store = SnapshotStore(1)
    yield SnapshotBuffer(snapshot_store.paths[0][0])
    snapshot_store.close()


def put(buffer, tensors, text="text"):
    """Write tensors into a snapshot buffer; returns its content."""
    buffer.write((1, 0), 1, TensorLayout(tensors), tensors, text)
    return buffer.content


def of_every_dtype():
    """Tensors of every dtype, with odd lengths, so that the layout must align them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        raw = torch.randint(0, 2, (dtype.itemsize * (2 * i + 3),), generator=generator, dtype=torch.uint8)
        tensors[f"{dtype}|é\\"] = raw.view(dtype)
    return tensors


def bits(tensors):
    return {key: tensor.contiguous().view(-1).view(torch.uint8) for key, tensor in tensors.items()}


def test_every_dtype_is_read_back(buffer):
    """To the bit, from memory and by safetensors' own reader, under unusual names."""
    tensors = of_every_dtype()
    content = put(buffer, tensors)
    tensor_buffer = TensorBuffer(content)
    assert "text" == tensor_buffer.text
    assert {*tensors} == {*tensor_buffer.keys}
    assert_same_bits(bits(tensors), bits({key: tensor_buffer.read(key) for key in tensor_buffer.keys}))
    shapes = {key: tensor_buffer.shape(key) for key in tensor_buffer.keys}
    assert shapes == {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert_same_bits(bits(tensors), bits(load(content.numpy().tobytes())))


def test_shapes_and_layouts_are_read_back(buffer):
    """Scalars, empty, transposed, expanded, channels last."""
    tensors = {
        "scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "turned": torch.arange(6).view(2, 3).t(),
        "same": torch.tensor([1.0]).expand(3, 2), "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip
    tensor_buffer = TensorBuffer(put(buffer, tensors))
    assert_same_bits(tensors, {key: tensor_buffer.read(key) for key in tensor_buffer.keys})


def test_nothing_but_a_text(buffer):
    """A rank that saves no tensor still saves its metadata."""
    tensor_buffer = TensorBuffer(put(buffer, {}, text='"quotes" and é'))
    assert ([], '"quotes" and é') == (tensor_buffer.keys, tensor_buffer.text)


def test_tensors_rarely_move_as_the_text_grows(buffer):
    """The header is padded to steps of 4096 bytes, so views of the tensors mostly stay valid."""
    tensors = {"a": torch.arange(10)}
    lengths = set()
    for words in range(0, 3000, 100):
        content = put(buffer, tensors, text="x" * words)
        lengths.add(len(content))
        assert_same_bits(tensors, {"a": TensorBuffer(content).read("a")})
    assert {0} == {(length - 80) % 4096 for length in lengths}
    assert len(lengths) <= 2


def test_a_layout_fits_the_same_shapes_only():
    """With the same keys in the same sequence."""
    layout = TensorLayout({"a": torch.zeros(2), "b": torch.zeros(3)})
    assert layout.fits({"a": torch.ones(2), "b": torch.ones(3)})
    for other in (
        {"a": torch.zeros(2)}, {"b": torch.zeros(3), "a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(3)},
        {"a": torch.zeros(2).double(), "b": torch.zeros(3)},
    ):  # fmt: skip
        assert not layout.fits(other)


def test_a_dtype_that_cannot_be_saved():
    """The error names it and the tensor."""
    with pytest.raises(TaskError, match=r"first.weight is of torch.complex128, which cannot be saved"):
        TensorLayout({"first.weight||whole|0|0": torch.zeros(1, dtype=torch.complex128)})


def test_the_header_is_json_behind_its_length():
    """As safetensors defines it."""
    header = TensorLayout({"a": torch.zeros(2, 3)}).header("text")
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length
    assert {"__metadata__": {"nbdist": "text"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}} == (
        json.loads(header[8:])
    )
