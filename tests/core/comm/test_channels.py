"""Collectives on each kind of channel: the bits of a sum, broadcasts, and what happens when a rank goes away."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import struct
import threading

import pytest
import torch
import torch.distributed as dist

from nbdist.core.comm import SoloChannel, process_group
from nbdist.core.comm.shared_memory import barrier_exchanges, receive_file, send_file
from nbdist.errors import PeerLostError, PlanError

KIB = 1024 // 4  # float32 elements
TCPI_BYTES_RECEIVED = 128  # offset in Linux's `tcp_info`
LENGTHS = {
    "one": 1,
    "tiny": 1000,
    "at the limit": 256 * KIB,
    "above it": 256 * KIB + 12,
    "above it, divisible by no size": 256 * KIB + 1,
    "of several chunks": 2500 * KIB + 1,
}


def mixed(rank, length, dtype=torch.float32):
    """Numbers of very different size, so that another reduction order changes the bits."""
    generator = torch.Generator().manual_seed(rank)
    exponents = torch.randint(-12, 12, (length,), generator=generator)
    return (torch.randn(length, generator=generator) * 2.0**exponents).to(dtype)


def sums(world):
    results = {}
    for name, length in LENGTHS.items():
        results[name] = mixed(world.rank, length)
        world.channel().all_reduce_(results[name])
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_sum_is_taken_in_rank_order(run_on_each_channel, size):
    """Every rank gets ((t0 + t1) + t2) + t3 bit for bit, in each of the three algorithms."""
    ranks = run_on_each_channel(size, sums)
    for name, length in LENGTHS.items():
        parts = [mixed(rank, length) for rank in range(size)]
        expected = parts[0].clone()
        for part in parts[1:]:
            expected += part
        for results in ranks:
            assert torch.equal(expected, results[name]), name
    if size > 2:  # check that the numbers distinguish reduction orders
        backwards = sum(reversed(parts[:-1]), start=parts[-1])
        assert not torch.equal(expected, backwards)


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16, 17, 64, 100, 1024])
def test_a_barrier_waits_for_all_ranks_with_few_messages(size):
    """After its rounds each rank knows of all, and the messages of a rank grow with the logarithm of their number."""
    known, sent = {0}, 0  # of all ranks by their distance: each rank does the same
    for steps in barrier_exchanges(size):
        known |= {(step + other) % size for step in steps for other in known}
        sent += len(steps)
    assert known == {*range(size)}
    assert sent <= 3 * math.ceil(math.log(size, 4) - 1e-9)
    assert size > 4 or sent == size - 1


def sum_a_little(world):
    total = torch.tensor([float(world.rank)])
    for _ in range(20):
        world.channel().all_reduce_(total.fill_(world.rank))
    return total.item()


def test_six_ranks_sum_through_two_rounds_of_a_barrier(run_ranks):
    """They meet ranks that they exchange no tag with, again and again."""
    assert run_ranks(6, sum_a_little) == [15.0] * 6


def broadcasts(world):
    channel = world.channel()
    tensors = [torch.full((3,), world.rank).to(dtype) for dtype in DTYPES]
    for tensor in tensors:
        channel.broadcast_(tensor, source=1)
    words = channel.broadcast_bytes(f"rank {world.rank}".encode()), channel.broadcast_bytes(b"", source=1)
    return tensors, words


def test_a_broadcast_gives_everyone_the_source(run_on_each_channel):
    """Tensors of any dtype, and bytes, empty ones too, come from the source rank."""
    for tensors, words in run_on_each_channel(3, broadcasts):
        assert [torch.ones(3).to(dtype).tolist() for dtype in DTYPES] == [t.tolist() for t in tensors]
        assert (b"rank 0", b"") == words


def several_at_once(world):
    channel = world.channel()
    tensors = [torch.full((4,), float(world.rank + i)) for i in range(5)]
    pending = [channel.start_all_reduce_(tensor) for tensor in tensors]
    for one in pending:
        one.wait()
    return [tensor[0].item() for tensor in tensors]


def test_collectives_may_be_under_way_together(run_on_each_channel):
    """Five all-reduces in flight at once all give their own sums."""
    assert [[3.0 + 3 * i for i in range(5)]] * 3 == run_on_each_channel(3, several_at_once)


def lose_rank_one(world, length):
    if world.rank == 1:
        os._exit(7)  # as a kill would
    try:
        world.channel().all_reduce_(torch.ones(length))
    except PeerLostError:
        return "released"


@pytest.mark.parametrize("length", [1, 300 * KIB])
def test_a_lost_rank_releases_the_others(run_on_each_channel, length):
    """A rank that dies ends the others' collective with an error; they do not hang."""
    with pytest.raises(RuntimeError, match="rank 1 died without a result"):
        run_on_each_channel(3, lose_rank_one, length)


def lose_rank_one_and_stay(world):
    """No rank that has noticed leaves before all have."""
    released = lose_rank_one(world, 1)
    world.store.set(f"released/{world.rank}", "yes")
    for rank in {*range(world.size)} - {1}:
        world.store.get(f"released/{rank}")
    return released


def test_a_lost_rank_releases_those_that_wait_for_others(run_ranks):
    """Of six ranks each waits for four: those that notice let the others know."""
    with pytest.raises(RuntimeError, match="rank 1 died without a result"):
        run_ranks(6, lose_rank_one_and_stay)


def fail_on_rank_one(world):
    if world.rank == 1:
        raise ZeroDivisionError("the cause")
    world.channel().all_reduce_(torch.ones(1))


def test_an_error_on_a_rank_is_the_one_that_is_seen(run_on_each_channel):
    """A rank that fails releases its peers; their `PeerLostError`, a secondary failure, does not hide the cause."""
    with pytest.raises(ZeroDivisionError, match="the cause"):
        run_on_each_channel(2, fail_on_rank_one)


def test_three_hosts_sum_in_rank_order(run_ranks):
    """With a middle host, and hosts of one rank and of two, a sum has the bits of ranks on one host."""
    expected = run_ranks(4, sums, channel="shared memory")[0]
    for results in run_ranks(4, sums, channel="three hosts"):
        assert all(torch.equal(expected[name], results[name]) for name in LENGTHS)


def scattered_and_gathered(world):
    channel, tensor = world.channel(), mixed(world.rank, 12 * KIB)
    part = channel.reduce_scatter(tensor)
    channel.all_reduce_(tensor)
    return torch.equal(torch.cat(channel.all_gather(part)), tensor)


@pytest.mark.parametrize("size", [3, 4])
def test_parts_of_a_sum_are_gathered_to_the_sum(run_on_each_channel, size):
    """Reduce-scatter and all-gather give the all-reduce's bits, also if hosts differ in their number of ranks."""
    assert run_on_each_channel(size, scattered_and_gathered) == [True] * size


def test_parts_of_a_sum_over_three_hosts_are_gathered_to_the_sum(run_ranks):
    """Reduce-scatter and all-gather give the all-reduce's bits, also on the middle host."""
    assert run_ranks(4, scattered_and_gathered, channel="three hosts") == [True] * 4


def broadcast_from_the_last(world):
    number = torch.tensor([world.rank])
    world.channel().broadcast_(number, source=world.size - 1)
    return number.item(), world.transport


def broadcasts_from_each(world):
    """Large enough for many pieces."""
    found = []
    for source in range(world.size):
        tensor = torch.full((700 * KIB + 3,), float(world.rank))
        world.channel().broadcast_(tensor, source)
        found.append(tensor.unique().tolist())
    return found


def test_a_broadcast_reaches_three_hosts_from_each(run_ranks):
    """From the middle one both ways."""
    assert run_ranks(4, broadcasts_from_each, channel="three hosts") == [[[float(i)] for i in range(4)]] * 4


def test_three_hosts_gather_all(run_ranks):
    """Of any dtype and shape, hosts of one rank and of two."""
    expected = run_ranks(4, gathered, channel="shared memory")[0]
    for found in run_ranks(4, gathered, channel="three hosts"):
        assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


def test_a_broadcast_may_come_from_any_host(run_ranks):
    """The source may be a rank that is not its host's leader; `transport` names what the ranks use."""
    assert run_ranks(4, broadcast_from_the_last, channel="two hosts") == [(3, "shared memory and TCP")] * 4
    assert run_ranks(4, broadcast_from_the_last, channel="shared memory") == [(3, "shared memory")] * 4


def lose_rank_one_but_not_its_child(world):
    if world.rank == 1:
        child = multiprocessing.get_context("fork").Process(target=threading.Event().wait, args=(3600,), daemon=True)
        child.start()
        world.store.set("child", str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.channel().all_reduce_(torch.ones(1))
    except PeerLostError:
        child = int(world.store.get("child"))
        lives = os.path.exists(f"/proc/{child}")
        if world.rank == 0:
            os.kill(child, signal.SIGKILL)
        raise ZeroDivisionError(lives) from None


def test_a_child_of_a_killed_rank_does_not_hold_the_others(run_ranks):
    """A forked data-loading process closes its rank's sockets, so the peers are released while it still lives."""
    with pytest.raises(ZeroDivisionError, match="True"):
        run_ranks(2, lose_rank_one_but_not_its_child)


def received() -> int:
    """Bytes received by this process's TCP connections, as the kernel counts them."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(number)))
        except OSError:  # no socket, or closed by now
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                about = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", about, TCPI_BYTES_RECEIVED)[0]
    return total


def bytes_moved(world):
    channel, tensor = world.channel(), torch.ones(world.size, 300 * KIB)
    channel.all_reduce_(torch.ones(1))
    moved = []
    for collective in (
        lambda: channel.all_gather(tensor[0]),
        lambda: channel.reduce_scatter(tensor.view(-1)),
        lambda: channel.all_reduce_(tensor),
    ):
        before = received()
        collective()
        moved.append(received() - before)
        channel.all_reduce_(torch.ones(1))  # a barrier: the next collective's bytes are not counted in this one
    return torch.tensor(moved) / tensor[0].nbytes


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the kernel does not count")
def test_a_gather_and_a_scatter_move_what_they_must(run_ranks):
    """Over gloo each rank gets one part of each other rank, half of what an all-reduce moves."""
    for moved in run_ranks(4, bytes_moved, channel="process group"):
        torch.testing.assert_close(moved, torch.tensor([3.0, 3.0, 6.0]), rtol=0.02, atol=0)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the kernel does not count")
def test_between_two_hosts_a_gather_and_a_scatter_move_what_they_must(run_ranks):
    """All-gather: each leader receives two parts. Reduce-scatter: the second receives a whole sum, and returns two."""
    moved = torch.stack(run_ranks(4, bytes_moved, channel="two hosts"))
    expected = torch.tensor([[2.0, 2.0, 4.0], [0.0, 0.0, 0.0], [2.0, 4.0, 4.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(moved, expected, rtol=0.02, atol=0.01)


def collectives_of_a_gather(world):
    """Those of torch that an all-gather starts."""
    channel, started = world.channel(), []

    def noting(owner, name, patch):
        start = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **options: started.append(name) or start(*args, **options))

    with pytest.MonkeyPatch.context() as patch:
        noting(dist, "broadcast", patch)
        noting(process_group, "_all_gather", patch)
        channel.all_gather(torch.ones(3))
    return started


def test_a_gather_is_one_collective(run_ranks):
    """Broadcasts from one rank after the other move as many bytes, in as many rounds as there are ranks."""
    assert [["_all_gather"]] * 3 == run_ranks(3, collectives_of_a_gather, channel="process group")


def gathered(world):
    channel = world.channel()
    tensors = [torch.full(shape, world.rank).to(dtype) for dtype in DTYPES for shape in ((), (2, 3), (0,))]
    return [torch.stack(channel.all_gather(tensor)) for tensor in tensors]


def test_a_gather_gives_everyone_all(run_on_each_channel):
    """All-gather of tensors of any dtype and shape, in rank order."""
    shapes = [(dtype, shape) for dtype in DTYPES for shape in ((), (2, 3), (0,))]
    expected = [torch.stack([torch.full(shape, rank).to(dtype) for rank in range(3)]) for dtype, shape in shapes]
    for found in run_on_each_channel(3, gathered):
        assert all(torch.equal(e, f) for e, f in zip(expected, found, strict=True))


def lose_rank_one_in(world, name):
    if world.rank == 1:
        os._exit(7)
    try:
        getattr(world.channel(), name)(torch.ones(3 * 100 * KIB))
    except PeerLostError:
        return "released"


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter"])
def test_a_lost_rank_ends_a_gather_and_a_scatter(run_on_each_channel, name):
    """The other ranks get an error, as in an all-reduce."""
    with pytest.raises(RuntimeError, match="rank 1 died without a result"):
        run_on_each_channel(3, lose_rank_one_in, name)


def test_a_peer_that_is_gone_gets_and_gives_no_memory():
    """A lost rank, and not an error of this one, which a run could not recover from."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(PeerLostError, match="another rank is gone"):
        send_file(ours, ours.fileno())
    ours, theirs = socket.socketpair()
    ours.send(b"unread")
    theirs.close()  # resets the connection
    with ours, pytest.raises(PeerLostError, match="another rank is gone"), receive_file(ours):
        pass


MISMATCHES = {
    "kinds": (lambda channel, x: channel.all_reduce_(x), lambda channel, x: channel.broadcast_(x)),
    "sizes": (lambda channel, x: channel.all_gather(x), lambda channel, x: channel.all_gather(x[:10])),
    "memory": (lambda channel, x: channel.zeros(9, x.dtype), lambda channel, x: channel.reduce_scatter(x)),
}


def differ(world, name):
    """The error of a rank of which the last is in another collective."""
    channel, x = world.channel(), torch.ones(60)
    channel.all_reduce_(torch.ones(3))
    try:
        MISMATCHES[name][world.rank == world.size - 1](channel, x)
    except PlanError as error:
        return str(error)


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_in_different_collectives_all_get_one_sentence(run_ranks, size, name):
    """It names both, in numbers of bytes; no rank waits for ever, and none gets numbers of the other."""
    texts = {
        "kinds": ("all-reduce of 240 bytes", "broadcast of 240 bytes"),
        "sizes": ("all-gather of 240 bytes", "all-gather of 40 bytes"),
        "memory": ("making common memory", "reduce-scatter of 240 bytes"),
    }
    errors = run_ranks(size, differ, name)
    assert [errors[0]] * size == errors
    assert errors[0].startswith("the ranks are in different collectives, which would mix up their numbers: of ")
    first, last = texts[name]
    assert ("rank 0" if size == 2 else f"ranks 0-{size - 2}") + f" in {first}" in errors[0]
    assert f", rank {size - 1} in {last}" in errors[0]


@pytest.mark.parametrize("name", ["kinds", "sizes"])
def test_hosts_in_different_collectives_get_one_sentence(run_ranks, name):
    """The leaders of the two hosts; the other ranks only learn that their leader is gone."""
    with pytest.raises(PlanError, match=r"of 2 ranks, rank 1 in all-.* of 240 bytes, rank 2 in "):
        run_ranks(3, raise_what_differs, name, channel="three hosts")


def raise_what_differs(world, name):
    raise PlanError(differ(world, name))


def differ_in_purpose(world):
    channel = world.channel()
    with pytest.raises(PlanError) as failed, channel.used_for(f"layer {world.rank}"):
        channel.all_reduce_(torch.ones(2))
    return str(failed.value)


def test_ranks_in_collectives_of_one_kind_and_size_for_another_purpose(run_ranks):
    """Their numbers would be mixed up without a word."""
    expected = "rank 0 in all-reduce of 8 bytes for layer 0, rank 1 in all-reduce of 8 bytes for layer 1"
    assert all(expected in error for error in run_ranks(2, differ_in_purpose))


def test_a_rank_alone_sums_and_broadcasts_to_itself():
    """On one rank every collective is the identity."""
    channel, tensor = SoloChannel(torch.device("cpu")), torch.arange(3.0)
    channel.all_reduce_(tensor)
    channel.broadcast_(tensor)
    assert [0.0, 1.0, 2.0] == tensor.tolist()
    assert b"word" == channel.broadcast_bytes(b"word")
