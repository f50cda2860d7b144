"""Links between two ranks, and channels over parts of the mesh."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from nbdist.core.comm import ProcessGroupLink, SharedMemoryLink, TcpLink
from nbdist.errors import PeerLostError
from nbdist.plan import Mesh

KINDS = {"shared memory": [SharedMemoryLink] * 2, "process group": [ProcessGroupLink] * 2,
         "two hosts": [SharedMemoryLink, TcpLink]}  # fmt: skip
UNUSUAL = (torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
TURN = torch.polar(torch.ones(4), torch.arange(4.0))
MESSAGES = [
    ("nothing", []),
    ("a scalar and a hole", [torch.tensor(3.0), None]),
    (
        "kinds",
        [torch.arange(5), torch.tensor([True, False]), torch.linspace(0, 1, 60, dtype=torch.float64).view(3, 4, 5)],
    ),
    ("not contiguous", [torch.arange(24.0).view(6, 4).t()]),
    ("empty", [torch.empty(0, 3), torch.empty(2, 0, dtype=torch.complex64)]),
    ("what gloo or nccl do not know", [torch.arange(5).to(dtype) for dtype in UNUSUAL]),
    ("lazy or expanded views", [TURN.conj(), TURN.conj().imag, torch.arange(3.0).expand(4, 3), TURN[::2].real]),
    ("large", [torch.arange(300_000.0)]),
]


def exchange(world, rounds):
    """Rank 1 sends to both neighbours and receives from them, all at once."""
    links = world.links([(0, 1), (2, 1)])
    if world.rank == 1:
        for i in range(rounds):
            for link in links.values():
                link.send(*MESSAGES[i % len(MESSAGES)])
    received = []
    for peer, link in links.items():
        for i in range(rounds):
            if world.rank != 1:
                link.send((world.rank, i), [torch.full((i,), float(i))])
        for _ in range(rounds):
            received.append((peer, *link.receive()))
    world.channel().all_reduce_(torch.ones(1))  # a message in flight would be lost if its sender ended
    return [type(links[peer]) for peer in sorted(links)], received


@pytest.mark.parametrize("kind", KINDS)
def test_messages_arrive_whole_and_in_order(run_ranks, kind):
    """For any tensors, both ways at once; no send waits for the other side."""
    rounds = 2 * len(MESSAGES)
    results = run_ranks(3, exchange, rounds, channel=kind)
    assert KINDS[kind] == results[1][0]
    for rank in (0, 2):
        for i, (peer, note, tensors) in enumerate(results[rank][1]):
            expected_note, expected = MESSAGES[i % len(MESSAGES)]
            assert (1, expected_note, len(expected)) == (peer, note, len(tensors))
            for sent, got in zip(expected, tensors, strict=True):
                assert (sent is None) == (got is None)
                assert sent is None or (sent.shape == got.shape and torch.equal(sent, got)), note
    assert [(peer, (peer, i)) for peer in (0, 2) for i in range(rounds)] == [m[:2] for m in results[1][1]]
    assert all(torch.equal(m[2][0], torch.full((m[1][1],), float(m[1][1]))) for m in results[1][1])


def fork_between_messages(world):
    """A data-loading process is forked, which closes its copies of the rank's sockets, and ends."""
    link = world.links([(0, 1)])[1 - world.rank]
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    link.send(world.rank, [torch.ones(3)])
    note, (tensor,) = link.receive()
    world.channel().all_reduce_(torch.ones(1))
    return note, tensor.tolist()


@pytest.mark.parametrize("kind", ["shared memory", "two hosts"])
def test_a_fork_does_not_end_a_link(run_ranks, kind):
    assert [(1, [1.0] * 3), (0, [1.0] * 3)] == run_ranks(2, fork_between_messages, channel=kind)


def run_ahead(world):
    link = world.links([(0, 1)])[1 - world.rank]
    if world.rank == 0:
        for i in range(200):
            link.send(i, [torch.full((1000,), float(i))])
        assert "end" == link.receive()[0]
        return len(link._free) + len(link._in_use)
    assert [(i, float(i)) for i in range(200)] == [
        (n, t[0][-1].item()) for n, t in (link.receive() for _ in range(200))
    ]
    link.send("end", [])
    return 0


def test_a_sender_that_runs_ahead_takes_bounded_memory(run_ranks):
    """It waits when many messages are in flight, and reuses segments that the receiver has freed."""
    assert run_ranks(2, run_ahead)[0] <= 65


def leave_a_link(world):
    link = world.links([(0, 1)])[1 - world.rank]
    if world.rank == 1:
        link.receive()  # the other rank's link is made too
        os._exit(7)  # as a kill would
    link.send("made", [])
    try:
        link.receive()
    except PeerLostError:
        raise ZeroDivisionError("released") from None


@pytest.mark.parametrize("kind", ["shared memory", "process group"])
def test_a_lost_peer_ends_the_wait(run_ranks, kind):
    """It raises at once."""
    with pytest.raises(ZeroDivisionError, match="released"):
        run_ranks(2, leave_a_link, channel=kind)


def along_axes(world):
    mesh = Mesh(pp=2, tp=2)
    channels = {axis: world.channel_within(mesh.groups(axis)) for axis in ("pp", "dp", "tp")}
    found = {}
    for axis, channel in channels.items():
        mine = torch.tensor([float(world.rank), 1.0])
        gathered = channel.all_gather(mine)
        flat = torch.arange(4 * channel.size, dtype=torch.float64) + world.rank
        part = channel.reduce_scatter(flat)
        channel.all_reduce_(mine)
        data = channel.broadcast_bytes(str(world.rank).encode(), channel.size - 1)
        found[axis] = (channel.size, mine.tolist(), torch.stack(gathered).tolist(), part.tolist(), data)
    return found


@pytest.mark.parametrize("kind", ["shared memory", "process group", "two hosts"])
def test_each_axis_has_a_channel_of_its_own(run_ranks, kind):
    """Sums, gathers, scatters and broadcasts stay among the ranks of the axis."""
    for rank, found in enumerate(run_ranks(4, along_axes, channel=kind)):
        for axis, group in {
            "pp": [rank % 2, rank % 2 + 2],
            "dp": [rank],
            "tp": [rank // 2 * 2, rank // 2 * 2 + 1],
        }.items():
            size, total, gathered, part, data = found[axis]
            assert (len(group), [float(sum(group)), float(len(group))]) == (size, total)
            assert [[float(r), 1.0] for r in group] == gathered
            sums = [float(len(group) * i + sum(group)) for i in range(4 * size)]
            assert sums[4 * group.index(rank) :][:4] == part
            assert str(group[-1]).encode() == data


def scatter_large(world):
    channel = world.channel()
    length = 3 * (1 << 20) // 8 // world.size * world.size
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(world.size, length, generator=generator, dtype=torch.float64)
    part = channel.reduce_scatter(rows[world.rank].clone())
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    gathered = torch.stack(channel.all_gather(rows[world.rank].clone()))
    return torch.equal(total.view(world.size, -1)[world.rank], part), torch.equal(rows, gathered)


def test_large_tensors_are_gathered_and_scattered_in_chunks(run_on_each_channel):
    """A tensor larger than the staging arena is still summed in rank order."""
    assert [(True, True)] * 3 == run_on_each_channel(3, scatter_large)
