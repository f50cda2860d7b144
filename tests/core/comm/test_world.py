"""Worlds: rendezvous, process groups, devices; what happens when a rank or the store is gone."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from gate import main_thread_is_in

from nbdist.core.comm.rendezvous import GenerationStore, connect_store, start_group
from nbdist.core.comm.world import World, host_store, pick_device
from nbdist.errors import PeerLostError, PlanError

generations = itertools.count(1)


def describe(world):
    return world.rank, world.size, world.local_rank, world.local_size, world.device.type, world.backend


def test_ranks_know_their_place(run_ranks):
    """Rank, size, device and backend; on one host every rank is local."""
    assert [(rank, 3, rank, 3, "cpu", "gloo") for rank in range(3)] == run_ranks(3, describe)


def form_again(world):
    """Leave the world, and form the next generation through the same store."""
    store, own = world.store.underlying_store, world.store.generation
    world.leave()
    world.leave()
    again = World.form(
        store=store, rank=world.rank, size=world.size, local_rank=world.rank, local_size=world.size, generation=own + 1
    )
    total = torch.ones(1)
    again.channel().all_reduce_(total)
    again.leave()
    return again.generation - own, total.item(), dist.is_initialized()


def test_the_next_generation_meets_through_the_same_store(run_ranks):
    """After leaving a world, the same processes can form another one; leaving twice is fine."""
    assert [(1, 2.0, False)] * 2 == run_ranks(2, form_again)


def adopt(world):
    with World.from_environment("cpu") as adopted:
        described = describe(adopted)
    return described == describe(world), dist.is_initialized()


def test_a_group_that_stands_is_adopted_and_left_standing(run_ranks):
    """`from_environment` uses an initialised process group, and does not destroy it."""
    assert [(True, True)] * 2 == run_ranks(2, adopt)


def listening(_world):
    return {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_everything_listens_on_loopback_only(run_ranks):
    """Gloo has no authentication, so it must not be reachable from other machines; the store is on no network."""
    store = host_store()
    assert [] == psutil.Process(store.server_pid).net_connections("inet")
    assert [{"127.0.0.1"}] * 2 == run_ranks(2, listening)


def test_the_store_serves_and_goes_away():
    """A client reads what another wrote; the server's process ends with the last reference."""
    store = host_store()
    address, server = store.address, psutil.Process(store.server_pid)
    client = connect_store(*address)
    client.set("key", "value")
    assert b"value" == store.get("key")
    del client, store
    assert not server.is_running()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(address[0])


def test_a_process_alone_is_a_world_of_one(monkeypatch):
    """Without torchrun's variables there is one rank, and no process group."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.from_environment("cpu") as world:
        assert (0, 1, 0, 1, "cpu", "") == describe(world)
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "unknown device 'gpu': use auto, cpu or cuda"), ("cuda", "device 'cuda' was requested, .*: use cpu or a")],
)
def test_a_device_that_is_not_there_is_refused(device, message, monkeypatch):
    """The error names the requested device and the available ones."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PlanError, match=message):
        pick_device(device, 0)
    assert torch.device("cpu") == pick_device("auto", 0)


def test_ranks_take_turns_on_the_gpus(monkeypatch):
    """One rank per GPU; with more ranks than GPUs they share them round-robin."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [0, 1, 0] == [pick_device("auto", rank).index for rank in range(3)]
    assert "cpu" == pick_device("cpu", 1).type


@pytest.fixture(scope="module")
def store():
    """One store for the tests below; each uses a new generation."""
    return host_store()


@pytest.fixture
def generation(store):
    """A new generation as its host sees it, and as a rank with a separate connection sees it."""
    number = next(generations)
    return GenerationStore(store, number), GenerationStore(connect_store(*store.address), number)


def later(act, *args, within=GenerationStore.wait):
    """Act once the main thread is within a function."""

    def acting():
        while not main_thread_is_in(within):
            time.sleep(0.001)
        act(*args)

    thread = threading.Thread(target=acting)
    thread.start()
    return thread


def test_a_wait_at_the_store_ends_with_a_release_of_its_generation(store, generation):
    """A release ends no other generation's waits; keys that are set can still be read."""
    host, ranks = generation
    ranks.set("there", "value")
    GenerationStore(store, next(generations)).release()
    assert (True, False) == (ranks.check(["there"]), ranks.check(["elsewhere"]))
    later(host.release)
    with pytest.raises(PeerLostError, match="the rendezvous was ended"):
        ranks.get("elsewhere")
    assert b"value" == ranks.get("there")


def test_a_wait_at_the_store_is_interrupted_at_once(generation):
    """Within one poll."""
    _, ranks = generation
    pressing = later(os.kill, os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ranks.wait(["never"])
    pressing.join()


def test_a_store_that_is_gone_is_a_lost_peer():
    """Both for a wait in it, and for a connection to it."""
    store = host_store()
    address = store.address
    ranks = GenerationStore(connect_store(*address), 1)
    del store
    with pytest.raises(PeerLostError, match="the store is gone"):
        ranks.get("never")
    with pytest.raises(PeerLostError, match="the store is gone"):
        connect_store(*address)


def test_torch_is_not_waited_for_when_the_ranks_are_released(generation):
    """`start_group` abandons a thread in which torch still waits; it ends by itself."""
    host, ranks = generation
    may_end = threading.Event()
    later(host.release, within=start_group)
    with pytest.raises(PeerLostError, match="the rendezvous was ended"):
        start_group(ranks, may_end.wait)
    may_end.set()


def form_after_failures(world):
    """Fail to form two worlds on rank 0 only, then form one with a rank that never failed."""
    store, own = world.store.underlying_store, world.store.generation
    world.leave()
    if world.rank == 0:
        for generation in (own + 1, own + 2):
            GenerationStore(store, generation).release()
            with pytest.raises(PeerLostError):
                World.form(store=store, rank=0, size=2, local_rank=0, local_size=2, generation=generation)
    again = World.form(
        store=store, rank=world.rank, size=2, local_rank=world.rank, local_size=2, device="cpu", generation=own + 3
    )
    total = torch.ones(1)
    dist.all_reduce(total)
    again.leave()
    return total.item()


def test_a_rank_that_could_not_form_a_world_forms_the_next_one(run_ranks):
    """Together with new ranks, although torch's group counter counts failed groups too."""
    assert [2.0, 2.0] == run_ranks(2, form_after_failures, channel="process group")
