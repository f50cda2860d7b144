"""The world: the ranks of one generation, their devices and backend, and how their process group is formed."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Imported early on purpose: its functions take the default group at import time as a default argument. Imported later
# (by an optimizer's first step), it would keep a destroyed group's sockets open, and waiting peers would hang.
import torch.distributed.nn.functional

from nbdist.core.comm import (
    Channel,
    HierarchicalChannel,
    Link,
    ProcessGroupChannel,
    ProcessGroupLink,
    SharedMemoryChannel,
    SharedMemoryLink,
    SoloChannel,
    TcpLink,
)
from nbdist.core.comm.authenticated_store import host_store
from nbdist.core.comm.group_sockets import keeping_alive, shut_connections
from nbdist.core.comm.interface import address_towards, choose_interface, own_address
from nbdist.core.comm.process_group import Work
from nbdist.core.comm.rendezvous import GenerationStore, barrier, start_group, unused_prefix
from nbdist.errors import PlanError
from nbdist.telemetry.host import host_id
from nbdist.upstream.torch_private import reset_group_count

__all__ = ["SHARED_GPU", "World", "host_store", "pick_device"]

_TIMEOUT = datetime.timedelta(minutes=30)
SHARED_GPU = "several ranks share a GPU: they communicate over gloo, which is slower than nccl with one rank per GPU."
_CHANNEL_VARIABLE = "NBDIST_CHANNEL"
_POLL_S, _RELEASED_EVERY_S = 1e-4, 0.1
_generations = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of one generation.

    Args:
        generation: Number of this world; after a failure a new world with the next number is formed.
        rank: This process's position, 0 ... size - 1.
        size: How many ranks there are.
        local_rank: Position among the ranks on this host.
        local_size: Ranks on this host.
        device: What this rank computes on.
        backend: "gloo" or "nccl", or empty for a world of one.
        store: The key-value store that all ranks share, hosted by another process; None without one.
        shared: The channel over all ranks of nbdist's own, if they compute on CPUs.
        hosts: The host of each rank, if ranks of one host may share memory; else empty.
        address: Of this rank's host, where the others reach it; empty if there are none.
    """

    generation: int = 0
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = ""
    store: Any = None
    shared: Channel | None = None
    hosts: tuple[str, ...] = ()
    address: str = ""
    _made: list[Any] = field(default_factory=list, repr=False)
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @classmethod
    def form(
        cls,
        *,
        store: Any,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        device: str = "auto",
        generation: int = 0,
    ) -> World:
        """Form a process group of all ranks. **Collective**: with the same `store`, `size` and `generation`.

        Returns after a first all-reduce over all ranks, so a formed world is known to work. ``$NBDIST_CHANNEL`` set to
        "process_group" disables shared memory. An interrupt lands at once.

        Raises:
            PeerLostError: The store or another rank is gone. The group and its channels are closed then.
        """
        choose_interface(one_host=local_size == size)
        chosen = pick_device(device, local_rank)
        names = GenerationStore(store, generation)
        ranks = [json.loads(info) for info in barrier(names, "rank", rank, size, json.dumps(_host_and_gpu(chosen)))]
        hosts = () if size == 1 or not ranks[0]["host"] else tuple(info["host"] for info in ranks)
        address = _agree_on_addresses(names, rank, size) if len(set(hosts)) > 1 else ""
        backend = "nccl" if chosen.type == "cuda" and len({info["gpu"] for info in ranks}) == size else "gloo"
        with contextlib.ExitStack() as undo:
            undo.callback(_destroy_group)
            shared: Channel | None = None
            if size > 1 and len(set(hosts)) == 1:  # before torch's group, which is slower to detect a lost rank
                shared = undo.enter_context(contextlib.closing(SharedMemoryChannel(rank, size, names, "memory")))
            start_group(names, functools.partial(_init_group, chosen, backend, names, rank, size))
            barrier(names, "group", rank, size)  # or a rank might start the all-reduce below while another has failed
            if address:
                channel = HierarchicalChannel(list(hosts), rank, names, "memory", address)
                shared = undo.enter_context(contextlib.closing(channel))
            world = cls(
                generation=generation,
                rank=rank,
                size=size,
                local_rank=local_rank,
                local_size=local_size,
                device=chosen,
                backend=backend,
                store=names,
                shared=shared,
                hosts=hosts,
                address=address,
            )
            first = world.channel().start_all_reduce_(torch.ones(1, dtype=torch.float32, device=chosen))
            if isinstance(first, Work):
                _wait_unless_released(first, names)
            first.wait()
            undo.pop_all()
        return world

    @classmethod
    @contextlib.contextmanager
    def from_environment(cls, device: str = "auto") -> Iterator[World]:
        """The world of this process: torchrun's, that of an already initialised process group, or a single rank.

        **Collective** under torchrun. A group that is created here is destroyed at the end.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if dist.is_initialized():
            yield cls._adopt(device)
            return
        if size == 1:
            yield cls(device=pick_device(device, 0))
            return
        rank = int(os.environ["RANK"])
        world = cls.form(
            store=_environment_store(),
            rank=rank,
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            device=device,
            generation=next(_generations),  # a script may train more than once
        )
        if world.shares_gpu and rank == 0:
            warnings.warn(SHARED_GPU, stacklevel=3)
        try:
            yield world
        finally:
            world.leave()

    @classmethod
    def _adopt(cls, device: str) -> World:
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        chosen = pick_device(device, local_rank)
        return cls(
            rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=chosen,
            backend=dist.get_backend(),
        )  # fmt: skip

    @property
    def shares_gpu(self) -> bool:
        """Whether several ranks compute on one GPU, so that nccl could not be used."""
        return self.device.type == "cuda" and self.backend == "gloo"

    def channel(self) -> Channel:
        """The channel over all ranks."""
        if self.size == 1:
            return SoloChannel(self.device)
        return self.shared or ProcessGroupChannel(self.device, streamed=self.backend == "nccl")

    def channel_within(self, groups: list[list[int]]) -> Channel:
        """The channel over the group that contains this rank; `groups` partition all ranks. **Collective**.

        It is closed with the world, if not before.
        """
        mine = next(group for group in groups if self.rank in group)
        number = next(self._numbers)
        if len(groups) == 1:
            return self.channel()
        made: Channel = SoloChannel(self.device)
        for group in groups:
            if len(group) == 1:
                continue
            if self._share_host(group):
                if group is mine:
                    made = SharedMemoryChannel(mine.index(self.rank), len(mine), self.store, f"{number}/{mine[0]}")
                continue
            if self.address:
                if group is mine:
                    hosts, rank = [self.hosts[each] for each in mine], mine.index(self.rank)
                    made = HierarchicalChannel(hosts, rank, self.store, f"{number}/{mine[0]}", self.address)
                continue
            torch_group = self._new_group(group)
            if group is mine:
                made = ProcessGroupChannel(self.device, streamed=self.backend == "nccl", group=torch_group, ranks=mine)
        self._made.append(made)
        return made

    def links(self, pairs: list[tuple[int, int]]) -> dict[int, Link]:
        """Point-to-point links to this rank's peers in `pairs`, by peer rank. **Collective** over the world.

        They are closed with the world, if not before.
        """
        number = next(self._numbers)
        made: dict[int, Link] = {}
        for pair in pairs:
            mine = self.rank in pair
            peer = pair[0] if self.rank == pair[1] else pair[1]
            name = f"{number}/{min(pair)}-{max(pair)}"
            if self._share_host(pair):
                if mine:
                    made[peer] = SharedMemoryLink(self.rank, peer, self.store, name, self.local_size)
                continue
            if self.address:
                if mine:
                    made[peer] = TcpLink(self.rank, peer, self.store, name, self.address)
                continue
            groups = self._new_group(sorted(pair)), self._new_group(sorted(pair))
            if mine:
                made[peer] = ProcessGroupLink(self.rank, peer, groups, self.device)
        self._made.extend(made.values())
        return made

    def _new_group(self, ranks: list[int]) -> Any:
        """A `torch.distributed` group. **Collective** over the world: called by all ranks, members or not."""
        if self.store is None:
            return dist.new_group(ranks)
        return start_group(self.store, functools.partial(dist.new_group, ranks))

    def _share_host(self, ranks: Iterable[int]) -> bool:
        return bool(self.hosts) and len({self.hosts[rank] for rank in ranks}) == 1

    @property
    def transport(self) -> str:
        """What gradients are sent over, as text for the user."""
        if self.shared is None:
            return self.backend
        within = ["shared memory"] if len(set(self.hosts)) < self.size else []
        return " and ".join([*within, *(["TCP"] if self.address else [])])

    def leave(self) -> None:
        """Close all channels, destroy the group; peers that wait for this rank get an error. Local, twice is fine."""
        for made in self._made:
            made.close()
        self._made.clear()
        if self.shared:
            self.shared.close()
        _destroy_group()


def pick_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: with "auto" its GPU where there are GPUs, else the CPU.

    Raises:
        PlanError: `device` is unknown, or there is no GPU.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if device == "cpu" or (device == "auto" and not gpus):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise PlanError(f"unknown device {device!r}: use auto, cpu or cuda.")
    if not gpus:
        raise PlanError("device 'cuda' was requested, but torch sees no GPU here: use cpu or auto.")
    return torch.device("cuda", local_rank % gpus)


def _host_and_gpu(device: torch.device) -> dict[str, str]:
    """What this rank sends to the others: its host, empty if it cannot share memory there, and its GPU's uuid."""
    if device.type == "cuda":
        return {"host": "", "gpu": str(torch.cuda.get_device_properties(device).uuid)}
    if os.environ.get(_CHANNEL_VARIABLE) == "process_group":
        return {"host": "", "gpu": ""}
    # Shared-memory channels need abstract sockets, which only Linux has.
    return {"host": host_id() if sys.platform == "linux" else "", "gpu": ""}


def _agree_on_addresses(store: GenerationStore, rank: int, size: int) -> str:
    """This host's address, where the others reach it. **Collective**.

    On the host of torchrun's rendezvous its name may lead to loopback; then a host that came from elsewhere shows the
    way.
    """
    own = own_address(store.underlying_store)
    others = [each for each in barrier(store, "address", rank, size, own) if not each.startswith("127.")]
    return address_towards(others[0]) if own.startswith("127.") and others else own


def _wait_unless_released(first: Work, store: GenerationStore) -> None:
    """Wait for the first collective of a process group. Local.

    Gloo keeps a connection open to a rank that has left while the group was formed, so that no error ever comes of it.

    Raises:
        PeerLostError: The ranks were released.
    """
    looked_s = time.monotonic()
    while not first.done:
        time.sleep(_POLL_S)
        if time.monotonic() - looked_s > _RELEASED_EVERY_S:
            store.check(["a key that nobody sets"])
            looked_s = time.monotonic()


def _init_group(device: torch.device, backend: str, store: Any, rank: int, size: int) -> None:
    """Create torch's default group. nccl refuses two ranks on one GPU, so `backend` is gloo for those."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # per thread, and this runs in a thread of `start_group`
    by_device = "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{backend}"
    reset_group_count()
    dist.init_process_group(by_device, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def _destroy_group() -> None:
    if dist.is_initialized():
        shut_connections()
        dist.destroy_process_group()


@functools.cache
def _environment_store() -> Any:
    """The store of torchrun's environment variables. **Collective**.

    Cached, because if rank 0 hosts the store, ranks can connect to it only once.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with keeping_alive():
        store, _, _ = next(dist.rendezvous("env://", rank, size))
    return unused_prefix(store, rank, size)
