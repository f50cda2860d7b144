"""File memory: tensors in a file are sent as a place there."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from nbdist.core.transfer.file_memory import FileMemory, extent_of
from nbdist.core.transfer.payload import pack, unpack
from nbdist.errors import TaskError

NUMBERS = 100_000


def in_file(tensor):
    return FileMemory().empty_like(tensor).copy_(tensor)


@pytest.fixture
def held():
    return in_file(torch.arange(float(NUMBERS)))


def there_and_back(value, **how):
    payload, segment = pack(value, **how)
    try:
        return unpack(payload), payload.nbytes
    finally:
        segment.close()


def test_values_arrive_and_the_segment_does_not_hold_them(held):
    arrived, nbytes = there_and_back(held)
    assert torch.equal(arrived, torch.arange(float(NUMBERS)))
    assert nbytes < 10_000


def test_another_host_gets_the_bytes(held):
    arrived, nbytes = there_and_back(held, by_file=False)
    assert torch.equal(arrived, torch.arange(float(NUMBERS)))
    assert nbytes > held.nbytes


def test_what_is_written_before_is_sent_and_what_the_receiver_writes_stays_there(held):
    held[0] = 7.0
    arrived, _ = there_and_back(held)
    arrived[1] = 8.0
    assert (arrived[0], held[1]) == (7.0, 1.0)


def test_a_receivers_copy_is_sent_by_value(held):
    """It may differ from the file."""
    arrived, _ = there_and_back(held)
    arrived[0] = 7.0
    again, nbytes = there_and_back(arrived)
    assert again[0] == 7.0
    assert nbytes > held.nbytes


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(300, 200).t(), torch.randn(8, 8, 50, 50).to(memory_format=torch.channels_last),
        torch.randn(100_000, dtype=torch.complex64), torch.arange(100_000).bfloat16(), torch.arange(100_000) % 2 == 0,
    ],
)  # fmt: skip
def test_layout_and_dtype_are_kept(tensor):
    held = in_file(tensor)
    assert extent_of(held.untyped_storage())
    for one in (held, there_and_back(held)[0]):
        assert torch.equal(one, tensor)
        assert (one.stride(), one.dtype) == (tensor.stride(), tensor.dtype)


def test_tensors_that_share_memory_still_do():
    first, second = nn.Linear(300, 300), nn.Linear(300, 300)
    first.weight.data = in_file(first.weight.data)
    second.weight = first.weight
    (one, other), _ = there_and_back((first, second))
    assert one.weight is other.weight
    assert torch.equal(one.weight, first.weight)


def test_a_view_arrives_as_one(held):
    (whole, part), _ = there_and_back((held, held[10:20]))
    part[0] = -1.0
    assert whole[10] == -1.0


def test_small_tensors_stay_in_memory():
    assert extent_of(FileMemory().empty_like(torch.ones(3)).untyped_storage()) is None


def test_a_full_disk_is_one_sentence():
    with pytest.raises(TaskError, match=r"the weights need 1,048,576\.0 GiB more in .*: set TMPDIR to a larger folder"):
        FileMemory().empty_like(torch.empty(2**50, dtype=torch.uint8, device="meta"))


def test_the_file_is_closed_with_its_last_tensor():
    memory = FileMemory()
    before = len(os.listdir("/proc/self/fd"))
    held = memory.empty_like(torch.empty(NUMBERS)).copy_(torch.arange(float(NUMBERS)))
    del memory
    part = held[5:]
    del held
    assert part[0] == 5.0
    address = part.untyped_storage().data_ptr()
    del part
    assert len(os.listdir("/proc/self/fd")) < before
    again = torch.frombuffer(bytearray(16), dtype=torch.uint8).untyped_storage()
    assert again.data_ptr() != address or extent_of(again) is None


def test_many_tensors_take_few_mappings():
    """A process may not have many open files, and each mapping is one."""
    memory, before = FileMemory(), len(os.listdir("/proc/self/fd"))
    held = [memory.empty_like(torch.empty(20_000)).fill_(i) for i in range(200)]
    arrived, _ = there_and_back(held)
    assert len(os.listdir("/proc/self/fd")) < before + 10
    assert [part[0].item() for part in arrived] == list(range(200))
    arrived[3][0] = 77.0
    again, _ = there_and_back(held)
    assert again[3][0] == 3.0


def test_nothing_takes_no_place():
    empty = FileMemory().empty_like(torch.empty(0, 4))
    assert (empty.shape, extent_of(empty.untyped_storage())) == ((0, 4), None)
