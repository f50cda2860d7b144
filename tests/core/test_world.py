"""Where ranks meet, and on what they compute."""

from __future__ import annotations

import socket

import psutil
import pytest
import torch
import torch.distributed as dist

from nbdist.core.world import World, host_store, pick_device
from nbdist.errors import PlanError


def describe(world):
    return world.rank, world.size, world.local_rank, world.local_size, world.device.type, world.backend


def test_ranks_know_their_place(run_ranks):
    """Rank, size, device and backend; on one host every rank is local."""
    assert [(rank, 3, rank, 3, "cpu", "gloo") for rank in range(3)] == run_ranks(3, describe)


def form_again(world):
    """Leave, and meet once more through the same store as the next generation."""
    store = world.store.underlying_store
    world.leave()
    world.leave()
    again = World.form(
        store=store, rank=world.rank, size=world.size, local_rank=world.rank, local_size=world.size, generation=1
    )
    total = torch.ones(1)
    again.channel().all_reduce_(total)
    again.leave()
    return again.generation, total.item(), dist.is_initialized()


def test_the_next_generation_meets_through_the_same_store(run_ranks):
    """A world that was left can be followed by another one in the same processes; leaving twice is fine."""
    assert [(1, 2.0, False)] * 2 == run_ranks(2, form_again)


def adopt(world):
    with World.from_environment("cpu") as adopted:
        described = describe(adopted)
    return described == describe(world), dist.is_initialized()


def test_a_group_that_stands_is_adopted_and_left_standing(run_ranks):
    """`from_environment` takes the group that is there and does not end it."""
    assert [(True, True)] * 2 == run_ranks(2, adopt)


def listening(_world):
    return {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_everything_listens_on_loopback_only(run_ranks):
    """Neither the store nor gloo can be reached from another machine, for neither asks who is there."""
    store = host_store()
    mine = [c for c in psutil.Process().net_connections("inet") if c.laddr.port == store.port]
    assert {"127.0.0.1"} == {c.laddr.ip for c in mine if c.status == psutil.CONN_LISTEN}
    assert [{"127.0.0.1"}] * 2 == run_ranks(2, listening)


def test_the_store_serves_and_goes_away():
    """A client reads what another wrote; without the last reference the port is free again."""
    store = host_store()
    port = store.port
    client = dist.TCPStore("127.0.0.1", port, is_master=False)
    client.set("key", "value")
    assert b"value" == store.get("key")
    del client, store
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))


def test_a_process_alone_is_a_world_of_one(monkeypatch):
    """Without torchrun's variables there is one rank, and no process group."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.from_environment("cpu") as world:
        assert (0, 1, 0, 1, "cpu", "") == describe(world)
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "unknown device 'gpu': use auto, cpu or cuda"), ("cuda", "device 'cuda' was asked for, .*: use cpu or a")],
)
def test_a_device_that_is_not_there_is_refused(device, message, monkeypatch):
    """The error names what was asked for and what can be had."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlanError, match=message):
        pick_device(device, 0)
    assert torch.device("cpu") == pick_device("auto", 0)


def test_ranks_take_turns_on_the_gpus(monkeypatch):
    """One rank a GPU; more ranks than GPUs share them in turn."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [0, 1, 0] == [pick_device("auto", rank).index for rank in range(3)]
    assert "cpu" == pick_device("cpu", 1).type
