"""Hierarchical collectives over several hosts, for CPU tensors: shared memory within a host, TCP between hosts.

The first rank of each host is its leader, and leaders are connected in a chain (`HostChain`). For a sum, a leader adds
the tensors of its host, which it maps, to the sum of the hosts before. So a tensor travels once each way between two
hosts, however many ranks they have, and has the bits of a sum on one host.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from nbdist.core.comm.background_channel import BackgroundChannel
from nbdist.core.comm.channel import Channel, Done, Pending, SoloChannel
from nbdist.core.comm.collective_tag import CollectiveTag, tag_of
from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.host_chain import HostChain
from nbdist.core.comm.shared_memory import STAGING_BYTES, SharedMemoryChannel

__all__ = ["FAST", "HierarchicalChannel"]

FAST = 200e6
"""Bytes a second from which on a network is fast: the ranks need the processors more than it needs them."""
_PROBE_BYTES = 1 << 20
_PROBES = 3


class HierarchicalChannel(Channel):
    """Ranks of several hosts. **Collective**: all of them construct it.

    Args:
        hosts: The host of each rank; see `groups`.
        rank: This rank.
        store: For the rendezvous.
        name: Unique to this channel among the users of `store`.
        address: Of this host, where the others reach it.
    """

    def __init__(self, hosts: list[str], rank: int, store: Any, name: str, address: str) -> None:
        super().__init__(rank, len(hosts), torch.device("cpu"))
        groups = self.groups(hosts)
        self._beside: Channel | None = None
        self._make_another = functools.partial(HierarchicalChannel, hosts, rank, store, f"{name}/beside", address)
        self._leaders = [group[0] for group in groups]
        self._counts = [len(group) for group in groups]
        self._host_of = {other: i for i, group in enumerate(groups) for other in group}
        self._host = self._host_of[rank]
        group = groups[self._host]
        self._whole: list[torch.Tensor] = []  # made by `zeros`, on a host of one rank
        self._shared: SharedMemoryChannel | None = None
        self._chain: HostChain | None = None
        try:
            if len(group) > 1:
                self._shared = SharedMemoryChannel(rank - group[0], len(group), store, f"{name}/{group[0]}")
            if rank == group[0]:
                self._chain = HostChain(self._leaders, rank, store, f"{name}/leaders", address)
        except BaseException:
            self.close()
            raise
        self._local: Channel = self._shared or SoloChannel(self.device)

    @staticmethod
    def groups(hosts: list[str]) -> list[list[int]]:
        """The ranks of each host, in rank order; a host whose ranks are not consecutive has several groups."""
        return [list(ranks) for _, ranks in itertools.groupby(range(len(hosts)), key=hosts.__getitem__)]

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Channel.zeros`."""
        made = self._local.zeros(numel, dtype)
        if self._shared is None:  # else that knows them
            self._whole.append(made)
        return made

    def free(self, tensor: torch.Tensor) -> None:
        """See `Channel.free`."""
        self._whole = [made for made in self._whole if made.data_ptr() != tensor.data_ptr()]
        self._local.free(tensor)

    def beside(self) -> Channel:
        """See `Channel.beside`: it pays where the hosts' network is slow. The same one each time."""
        if self._beside is None:
            self._beside = self
            if self._is_slow():
                another = self._make_another()
                self._beside = BackgroundChannel(another, another.hang_up)
        return self._beside

    def _is_slow(self) -> bool:
        """Whether a sum, which is tried, takes longer than `FAST` allows. **Collective**; the same on all ranks."""
        probe, seconds = torch.zeros(_PROBE_BYTES, dtype=torch.uint8), torch.full((_PROBES,), math.inf)
        for i in range(_PROBES):
            began_s = time.perf_counter()
            self.all_reduce_(probe)
            seconds[i] = time.perf_counter() - began_s
        self.broadcast_(seconds)
        return _PROBE_BYTES / seconds.min().item() < FAST

    @comm_timer.communicating()
    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """See `Channel`; done on return."""
        tag = self._tag("all-reduce", tensor)
        for slabs in self._mapped(tensor):
            self._sum_(slabs, tag)
        return Done()

    @comm_timer.communicating()
    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`; done on return."""
        origin, tag = self._host_of[source], self._tag("broadcast", tensor)
        if self._host == origin:
            self._local.broadcast_(tensor, source - self._leaders[origin])
        if self._chain is not None:
            self._chain.broadcast_(tensor.view(-1), origin, tag)
        if self._host != origin:
            self._local.broadcast_(tensor)
        return Done()

    @comm_timer.communicating()
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Channel`; each host's tensors travel together."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        hosts = gathered.split(self._counts)
        torch.stack(self._local.all_gather(tensor), out=hosts[self._host])
        if self._chain is not None:
            self._chain.all_gather(hosts, self._tag("all-gather", tensor))
        self._local.broadcast_(gathered)
        return list(gathered)

    @comm_timer.communicating()
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Channel`; the total travels only as far as a rank needs it."""
        total, tag = tensor.clone(), self._tag("reduce-scatter", tensor)
        length, start = len(total) // self.size, 0
        kept = length * (self._leaders[self._host] + self._counts[self._host])
        passed = length * self._leaders[self._host]
        for slabs in self._mapped(total):
            stop = start + len(slabs[0])
            self._sum_(slabs, tag, *(min(max(end, start), stop) - start for end in (kept, passed)))
            start = stop
        return total.view(self.size, -1)[self.rank].clone()

    def hang_up(self) -> None:
        """Shut all connections: each wait of this rank or for it fails at once. Local."""
        for part in (self._shared, self._chain):
            if part is not None:
                part.hang_up()

    def close(self) -> None:
        """See `Channel.close`."""
        self._whole = []
        if self._beside is not None and self._beside is not self:
            self._beside.close()
        if self._shared is not None:
            self._shared.close()
        if self._chain is not None:
            self._chain.close()

    def _tag(self, kind: str, tensor: torch.Tensor) -> CollectiveTag:
        return tag_of(kind, tensor.nbytes, self.purpose)

    def _mapped(self, tensor: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """See `SharedMemoryChannel.mapped`. A host of one rank uses the same chunks, which hosts sum one by one."""
        if self._shared is not None:
            return self._shared.mapped(tensor)
        flat, address = tensor.view(-1), tensor.data_ptr()
        whole = any(0 <= address - made.data_ptr() < made.nbytes for made in self._whole)
        return iter([[part] for part in ([flat] if whole else flat.split(STAGING_BYTES // flat.itemsize))])

    def _sum_(self, slabs: list[torch.Tensor], tag: CollectiveTag, *needed: int) -> None:
        """Replace the tensor of every rank of this host by the sum over all ranks.

        Args:
            slabs: The tensors of this host's ranks.
            tag: What for.
            needed: See `HostChain.sum_`; by default the whole sum is.
        """
        if self._shared is not None:
            self._shared.barrier(tag)
        if self._chain is not None:
            self._chain.sum_(slabs, tag, *needed)
        if self._shared is not None:
            self._shared.barrier(tag)
            if self._shared.rank > 0:
                slabs[self._shared.rank].copy_(slabs[0])
            self._shared.barrier(tag)  # only now the leader may change its own
