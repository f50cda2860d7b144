"""The world: which ranks there are, what they run on, how they meet."""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the default group of the moment of import among their defaults. Imported later (by an optimizer's
# first step), it would hold that group's sockets open, and with them every peer that waits, after the group is gone.
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
)
from nbdist.core.comm.guarded_store import host_store
from nbdist.core.comm.rendezvous import GenerationStore, barrier, start_group, untouched
from nbdist.errors import PlanError
from nbdist.telemetry.host import host_id

__all__ = ["SHARED_GPU", "World", "host_store", "pick_device"]

_TIMEOUT = datetime.timedelta(minutes=30)
SHARED_GPU = "several ranks share a GPU: they meet over gloo, which is slower than nccl with one rank a GPU."
_CHANNEL_VARIABLE = "NBDIST_CHANNEL"
_generations = itertools.count(1)
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of one generation.

    Args:
        generation: Number of this world in the life of its processes; a world that failed is never used again.
        rank: This process's position, 0 ... size - 1.
        size: How many ranks there are.
        local_rank: Position among the ranks on this host.
        local_size: Ranks on this host.
        device: What this rank computes on.
        backend: "gloo" or "nccl", or empty for a world of one.
        store: The key-value store all ranks share, hosted outside of them; None where nobody outside takes part.
        shared: The channel that goes through shared memory, where ranks that compute on CPUs share a host.
        hosts: The host of each rank, where ranks of one host may share memory; else empty.
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
        """Meet the other ranks. **Collective**: all ranks, with the same `store`, `size` and `generation`.

        Returns after a first all-reduce over everyone, so a world that was formed works. ``$NBDIST_CHANNEL`` set to
        "process_group" keeps shared memory out. An interrupt lands at once.

        Raises:
            PeerLostError: The store is gone, or another rank. Nothing is left of the world then.
        """
        if local_size == size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        chosen = pick_device(device, local_rank)
        names = GenerationStore(store, generation)
        words = [json.loads(word) for word in barrier(names, "rank", rank, size, json.dumps(_whereabouts(chosen)))]
        hosts = () if size == 1 or not words[0]["host"] else tuple(word["host"] for word in words)
        backend = "nccl" if chosen.type == "cuda" and len({word["gpu"] for word in words}) == size else "gloo"
        with contextlib.ExitStack() as undo:
            undo.callback(_leave_group)
            shared: Channel | None = None
            if size > 1 and len(set(hosts)) == 1:  # before torch's group, in which a rank is slow to miss another
                shared = undo.enter_context(contextlib.closing(SharedMemoryChannel(rank, size, names, "memory")))
            start_group(names, functools.partial(_init_group, chosen, backend, names, rank, size))
            barrier(names, "group", rank, size)  # or one of us would sum already, and could not take it back
            if shared is None and len(HierarchicalChannel.groups(list(hosts))) < len(hosts):
                shared = undo.enter_context(contextlib.closing(HierarchicalChannel(list(hosts), rank, names, "memory")))
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
            )
            world.channel().all_reduce_(torch.ones(1, device=chosen))
            undo.pop_all()
        return world

    @classmethod
    @contextlib.contextmanager
    def from_environment(cls, device: str = "auto") -> Iterator[World]:
        """The world this process was started in: torchrun's, a group that is already initialised, or one rank alone.

        **Collective** under torchrun. A group that was formed here is left again at the end.
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
        """The channel over this rank's group of a partition of all ranks. **Collective** over the world.

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
            torchs = self._new_group(group)
            if group is mine:
                made = ProcessGroupChannel(self.device, streamed=self.backend == "nccl", group=torchs, ranks=mine)
        self._made.append(made)
        return made

    def links(self, pairs: list[tuple[int, int]]) -> dict[int, Link]:
        """Links to the peers that this rank has in `pairs`, by rank. **Collective** over the world.

        They are closed with the world, if not before.
        """
        number = next(self._numbers)
        made: dict[int, Link] = {}
        for pair in pairs:
            mine = self.rank in pair
            peer = pair[0] if self.rank == pair[1] else pair[1]
            if self._share_host(pair):
                if mine:
                    name = f"{number}/{min(pair)}-{max(pair)}"
                    made[peer] = SharedMemoryLink(self.rank, peer, self.store, name, self.local_size)
                continue
            groups = self._new_group(sorted(pair)), self._new_group(sorted(pair))
            if mine:
                made[peer] = ProcessGroupLink(self.rank, peer, groups, self.device)
        self._made.extend(made.values())
        return made

    def _new_group(self, ranks: list[int]) -> Any:
        """A group of torch's. **Collective** over the world: by all ranks, members or not."""
        if self.store is None:
            return dist.new_group(ranks)
        return start_group(self.store, functools.partial(dist.new_group, ranks))

    def _share_host(self, ranks: Iterable[int]) -> bool:
        return bool(self.hosts) and len({self.hosts[rank] for rank in ranks}) == 1

    @property
    def transport(self) -> str:
        """What the ranks' gradients travel over, for people."""
        between = [self.backend] if self.shared is None or isinstance(self.shared, HierarchicalChannel) else []
        return " and ".join([*(["shared memory"] if self.shared else []), *between])

    def leave(self) -> None:
        """Leave this world; peers that wait for this rank are released with an error. Local, twice is fine."""
        for made in self._made:
            made.close()
        self._made.clear()
        if self.shared:
            self.shared.close()
        _leave_group()


def pick_device(device: str, local_rank: int) -> torch.device:
    """The device of a rank: with "auto" its GPU where there are GPUs, else the CPU.

    Raises:
        PlanError: The word is unknown, or there is no GPU.
    """
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if device == "cpu" or (device == "auto" and not gpus):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise PlanError(f"unknown device {device!r}: use auto, cpu or cuda.")
    if not gpus:
        raise PlanError("device 'cuda' was asked for, but torch sees no GPU here: use cpu or auto.")
    return torch.device("cuda", local_rank % gpus)


def _whereabouts(device: torch.device) -> dict[str, str]:
    """What the other ranks must know of this one: its host, if it can share memory there, and its GPU."""
    if device.type == "cuda":
        return {"host": "", "gpu": str(torch.cuda.get_device_properties(device).uuid)}
    if os.environ.get(_CHANNEL_VARIABLE) == "process_group":
        return {"host": "", "gpu": ""}
    # Linux alone has sockets without a name in the file system; elsewhere every rank is a host of its own.
    return {"host": host_id() if sys.platform == "linux" else f"process {os.getpid()}", "gpu": ""}


def _init_group(device: torch.device, backend: str, store: Any, rank: int, size: int) -> None:
    """Make torch's default group. nccl refuses two ranks on one GPU, so `backend` is gloo for those."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # in this thread, too
    by_device = "gloo" if device.type == "cpu" else f"cpu:gloo,cuda:{backend}"
    # torch numbers its groups, by which they meet, and does not count back when one could not be made.
    numbered = getattr(dist.distributed_c10d, "_world", None)
    if numbered is not None and hasattr(numbered, "group_count") and not dist.is_initialized():
        numbered.group_count = 0
    dist.init_process_group(by_device, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _environment_store() -> Any:
    """The store that torchrun's variables name; kept, for it can be reached only once where rank 0 hosts it.

    **Collective**.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    return untouched(store, rank, size)
