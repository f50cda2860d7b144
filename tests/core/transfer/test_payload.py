"""Payloads: objects and their tensors are sent to other processes through shared memory."""

from __future__ import annotations

import os
import sqlite3
import weakref

import numpy as np
import pytest
import torch
from open_files import memory_files
from problems import SGD, classes, mlp, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.state.snapshot import SnapshotBuffer
from nbdist.core.transfer.payload import Payload, Segment, SegmentCache, is_released, pack, unpack
from nbdist.errors import ClusterError, TaskError


def there_and_back(value, **how):
    payload, segment = pack(value, **how)
    try:
        return unpack(payload)
    finally:
        segment.close()


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int8, torch.uint8,
    torch.bool, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_arrives(dtype):
    """Same bits, shape and dtype."""
    tensor = torch.arange(12).view(3, 4).to(dtype)
    arrived = there_and_back(tensor)
    assert (dtype, (3, 4)) == (arrived.dtype, tuple(arrived.shape))
    assert torch.equal(tensor.to(torch.complex128), arrived.to(torch.complex128))


BASE = torch.arange(24.0).view(4, 6)
VIEWS = {
    "transposed": BASE.t(), "strided": BASE[::2, 1::3], "offset": BASE[2:], "expanded": torch.ones(3, 1).expand(3, 5),
    "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "parameter": nn.Parameter(BASE.clone()), "needs a gradient": BASE.clone().requires_grad_(),
    "sparse": torch.eye(3).to_sparse(),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_every_layout_arrives(name):
    """Views, scalars, empty and sparse tensors, parameters and gradient flags."""
    tensor = VIEWS[name]
    arrived = there_and_back(tensor)
    assert torch.equal(tensor.to_dense(), arrived.to_dense())
    assert type(tensor) is type(arrived)
    assert (tensor.requires_grad, tensor.layout) == (arrived.requires_grad, arrived.layout)
    if name in ("transposed", "strided", "offset", "expanded"):
        assert tensor.stride() == arrived.stride()


def test_arrays_arrive():
    """NumPy arrays of any order, writable and read-only, of strings and objects too."""
    arrays = [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.arange(4)[::-1], np.array(["a", None])]
    arrays[0].flags.writeable = False
    for array, arrived in zip(arrays, there_and_back(arrays), strict=True):
        np.testing.assert_array_equal(array, arrived)


def test_what_shares_memory_shares_it_still():
    """Views of one tensor, and tied weights, share memory at the receiver too, and are sent once."""
    base = torch.zeros(1000)
    payload, segment = pack([base, base[10:20], {"again": base}])
    whole, part, again = unpack(payload)
    segment.close()
    whole[10] = 7
    assert (7, 7) == (part[0], again["again"][10])
    assert payload.nbytes < 2 * base.nbytes

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    arrived = there_and_back(model)
    assert arrived[0].weight is arrived[1].weight


def test_an_optimizer_stays_bound_to_its_model():
    """It updates the parameters of the model that was sent with it, from the state that it had."""
    x, y = classes(6)
    model = mlp()
    optimizer = SGD(model.parameters())

    def step(model, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return weights(model)

    step(model, optimizer)
    arrived = there_and_back((model, optimizer))
    torch.testing.assert_close(step(*arrived), step(model, optimizer), rtol=0, atol=0)


CELL = """
import torch
from torch import nn

SCALE = 3.0

def factor(n):
    def inner():
        return SCALE * n
    return inner

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

class Net(Base):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return (self.weight * x * self.inner()).sum()
"""


def call_arrived(_world, payload):
    net, lambda_ = unpack(payload)
    return net(torch.ones(2)).item(), lambda_(1), type(net).__name__


def test_what_a_cell_defined_travels_by_value(run_ranks):
    """Classes with ``super()``, closures and globals of a notebook work in a process that never saw the cell."""
    cell = {"__name__": "__main__"}
    exec(CELL, cell)
    payload, segment = pack((cell["Net"](cell["factor"](2)), lambda x: x + cell["SCALE"]))
    assert [(12.0, 4.0, "Net")] == run_ranks(1, call_arrived, payload)
    segment.close()


def write_on_rank_zero(world, payload):
    tensor, array = unpack(payload)
    if world.rank == 0:
        tensor.fill_(5)
        array[:] = 5
    world.channel().all_reduce_(torch.ones(1))  # rank 0 has written
    return tensor.sum().item(), array.sum().item()


def test_a_write_stays_with_the_writer(run_ranks):
    """All ranks map the same memory, but a rank's writes are not visible to others, nor to the sender."""
    tensor, array = torch.ones(100), np.ones(100)
    payload, segment = pack((tensor, array))
    assert [(500.0, 500.0), (100.0, 100.0)] == run_ranks(2, write_on_rank_zero, payload)
    assert 100.0 == unpack(payload)[0].sum() == tensor.sum()
    segment.close()


def test_a_closed_segment_is_gone_but_for_those_who_have_it():
    """After close it cannot be opened any more; unpacked objects stay valid, and closing twice is fine."""
    payload, segment = pack(torch.arange(100_000))
    arrived = unpack(payload)
    segment.close()
    segment.close()
    with pytest.raises(ClusterError, match="is gone"):
        unpack(payload)
    del segment
    assert 99_999 == arrived[-1]


def test_a_large_tensor_is_copied_whole():
    """A content of more than 1 MiB is copied by torch, with all its threads."""
    large = torch.arange(2**18 + 3, dtype=torch.float64)
    small = torch.arange(3.0)
    arrived = there_and_back([small, large, small])
    assert torch.equal(large, arrived[1])
    assert torch.equal(small, arrived[2])


def test_a_segment_that_nobody_holds_is_freed():
    """No descriptor is left when the sender drops it."""
    before = memory_files()
    segment = Segment(10)
    assert before + 1 == memory_files()
    forgotten = weakref.ref(segment)
    del segment
    assert forgotten() is None
    assert before == memory_files()


@pytest.mark.parametrize("value", [sqlite3.connect(":memory:"), {"rows": sqlite3.connect(":memory:")}])
def test_what_cannot_be_pickled_is_a_task_error(value):
    """One sentence names the value, whatever pickle raised."""
    with pytest.raises(TaskError, match=r"^it(\['rows'\])? is a Connection \(cannot pickle .*\), which cannot be sent"):
        pack(value)


def send(segment_cache, value, is_free=lambda: True):
    """Pack, unpack and recycle the segment; returns its path and the unpacked value."""
    payload, segment = pack(value, segment_cache=segment_cache)
    arrived = unpack(payload)
    segment_cache.recycle(segment, is_free)
    return payload.path, arrived


@pytest.mark.parametrize("numbers", [10, 2**19])
def test_a_segment_that_came_back_is_used_again(numbers):
    """For a value that fits into it; the receiver gets the second content, not the first."""
    segment_cache = SegmentCache()
    first, arrived = send(segment_cache, torch.zeros(numbers))
    del arrived
    again, arrived = send(segment_cache, torch.ones(numbers))
    assert first == again
    assert torch.equal(torch.ones(numbers), arrived)
    smaller, arrived = send(segment_cache, torch.full((3,), 2.0))
    assert first == smaller
    assert [2.0] * 3 == arrived.tolist()
    _, arrived = send(segment_cache, torch.arange(2 * numbers))
    assert torch.equal(torch.arange(2 * numbers), arrived)
    segment_cache.recycle(Segment(1), lambda: True)


def test_a_segment_in_which_something_lies_is_not_written_again():
    """The first value stays as it is, and `is_released` is false until the receiver has dropped it."""
    segment_cache = SegmentCache()
    path, arrived = send(segment_cache, torch.zeros(1000), is_free=lambda: is_released(path))
    assert not is_released(path)
    _, second = send(segment_cache, torch.ones(1000))
    assert not arrived.any()
    assert second.all()
    segment_cache.recycle(Segment(1), lambda: True)


def test_who_holds_a_part_has_not_let_go():
    """A view of one tensor keeps it mapped; a cycle that only the garbage collector finds does not."""
    payload, segment = pack([torch.zeros(10), torch.ones(10)])
    arrived = unpack(payload)
    row = arrived[1][2:4]
    del arrived
    assert not is_released(payload.path)
    knot = [row]
    knot.append(knot)
    del row, knot
    assert is_released(payload.path)
    segment.close()


def test_a_path_leads_to_its_segment_or_nowhere():
    """Even if its descriptor's number belongs to another file by now, a segment or not."""
    first = Segment(10)
    path, number = first.path, int(first.path.partition("/fd/")[2].partition(":")[0])
    payload = Payload(path=path, code_bytes=1, table_start=5, nbytes=10)
    first.close()
    with pytest.raises(ClusterError, match=f"the shared memory /proc/{os.getpid()}/fd/{number} is gone"):
        unpack(payload)
    other = os.memfd_create("other")
    os.dup2(other, number)
    try:
        for late in (lambda: unpack(payload), lambda: Segment(1, path=path), lambda: SnapshotBuffer(path).head):
            with pytest.raises(ClusterError, match=f"fd/{number} is gone"):
                late()
    finally:
        os.close(number)
        if other != number:
            os.close(other)


class Holding:
    """Holds segments, and writes the path of a released one into a file."""

    def __init__(self, released):
        self.released, self.held = released, []

    def hold(self):
        self.held.append(Segment(1))
        return self.held[-1].path

    def release(self, path):
        self.released.write_text(path)


def test_a_forked_child_lets_go_of_nothing(tmp_path):
    """A segment belongs to its creator: dropping or closing it in a forked child does not release it."""
    holder = Holding(tmp_path / "released")
    segment = Segment(10, holder)
    child = os.fork()
    if not child:
        segment.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert not holder.released.exists()
    assert 10 == Segment(1, path=segment.path).size
    segment.close()
    assert segment.path == holder.released.read_text()
