"""Hierarchical collectives over several hosts, for CPU tensors: shared memory within a host, a process group between.

The first rank of each host is its leader. A sum is passed from host to host in rank order: a leader adds the previous
host's sum to its own tensor, its host all-reduces, and the leader sends the result on. The last leader sends the total
to all (all-reduce), or to each host its ranks' parts (reduce-scatter). So a tensor travels once each way between two
hosts, however many ranks they have, and has the bits of a sum on one host. An all-gather sends a host's tensors to each
other host as one message.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist

from nbdist.core.comm.channel import Channel, Done, Pending, SoloChannel
from nbdist.core.comm.process_group import Work
from nbdist.core.comm.rendezvous import start_group
from nbdist.core.comm.shared_memory import SharedMemoryChannel

__all__ = ["HierarchicalChannel"]


class HierarchicalChannel(Channel):
    """Ranks of several hosts, in a world with a process group. **Collective**: all of them construct it.

    Args:
        hosts: The host of each rank; see `groups`.
        rank: This rank.
        store: For the rendezvous.
        name: Unique to this channel among the users of `store`.
    """

    def __init__(self, hosts: list[str], rank: int, store: Any, name: str) -> None:
        super().__init__(rank, len(hosts), torch.device("cpu"))
        groups = self.groups(hosts)
        self._leaders = [group[0] for group in groups]
        self._counts = [len(group) for group in groups]
        self._host, group = next((i, group) for i, group in enumerate(groups) if rank in group)
        self._host_of = {other: i for i, group in enumerate(groups) for other in group}
        self._local: Channel = SoloChannel(self.device)
        # Groups of two, to send by broadcast: gloo's own send and receive can be waited for, but not polled.
        pairs = itertools.pairwise(self._leaders)
        self._links = [start_group(store, functools.partial(dist.new_group, list(pair))) for pair in pairs]
        self._between = start_group(store, lambda: dist.new_group(self._leaders))
        if len(group) > 1:
            self._local = SharedMemoryChannel(rank - group[0], len(group), store, f"{name}/{group[0]}")

    @staticmethod
    def groups(hosts: list[str]) -> list[list[int]]:
        """The ranks of each host, in rank order; a host whose ranks are not consecutive has several groups."""
        return [list(ranks) for _, ranks in itertools.groupby(range(len(hosts)), key=hosts.__getitem__)]

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Channel.zeros`."""
        return self._local.zeros(numel, dtype)

    def free(self, tensor: torch.Tensor) -> None:
        """See `Channel.free`."""
        self._local.free(tensor)

    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """See `Channel`; done on return."""
        self._sum_up_to_here_(tensor)
        last = len(self._leaders) - 1
        if self._local.rank == 0:
            self._send(tensor, self._leaders[last], self._between)
        if self._host < last:
            self._local.broadcast_(tensor)
        return Done()

    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`; done on return."""
        origin = self._host_of[source]
        if self._host == origin:
            self._local.broadcast_(tensor, source - self._leaders[origin])
        if self._local.rank == 0:
            self._send(tensor, self._leaders[origin], self._between)
        if self._host != origin:
            self._local.broadcast_(tensor)
        return Done()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Channel`; sent between hosts as bytes, because gloo does not send every dtype."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        hosts = gathered.split(self._counts)
        torch.stack(self._local.all_gather(tensor), out=hosts[self._host])
        if self._local.rank == 0:
            sent = [
                self._start_sending(block.view(-1).view(torch.uint8), leader, self._between)
                for block, leader in zip(hosts, self._leaders, strict=True)
            ]
            for work in sent:
                work.wait()
        self._local.broadcast_(gathered)
        return list(gathered)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Channel`."""
        total, last = tensor.clone(), len(self._leaders) - 1
        self._sum_up_to_here_(total)
        sizes = [count * (len(total) // self.size) for count in self._counts]
        here: torch.Tensor = total.split(sizes)[self._host]
        if self._local.rank == 0:
            # An all-to-all in which only the last leader, which has the total, sends: to each host its ranks' part.
            nothing, group = [0] * len(sizes), self._between
            if self._host == last:
                output, sent, output_sizes, sent_sizes = here[:0], total[: -sizes[last]], nothing, [*sizes[:last], 0]
            else:
                output, sent, output_sizes, sent_sizes = here, total[:0], [*nothing[:last], sizes[self._host]], nothing
            Work.launch(
                lambda: dist.all_to_all_single(output, sent, output_sizes, sent_sizes, group=group, async_op=True)
            ).wait()
        if self._host < last:
            self._local.broadcast_(here)
        return here.view(self._local.size, -1)[self._local.rank].clone()

    def close(self) -> None:
        """See `Channel.close`."""
        self._local.close()
        self._links, self._between = [], None  # a live reference would keep the groups' sockets open

    def _sum_up_to_here_(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by the sum over this host and all previous hosts, and send it to the next host."""
        leader = self._local.rank == 0
        if leader and self._host > 0:
            previous = torch.empty_like(tensor)
            self._send(previous, self._leaders[self._host - 1], self._links[self._host - 1])
            torch.add(previous, tensor, out=tensor)
        self._local.all_reduce_(tensor)
        if leader and self._host < len(self._leaders) - 1:
            self._send(tensor, self.rank, self._links[self._host])

    def _start_sending(self, tensor: torch.Tensor, source: int, group: Any) -> Work:
        """Start a broadcast of rank `source`'s tensor within `group`."""
        return Work.launch(lambda: dist.broadcast(tensor, source, group=group, async_op=True))

    def _send(self, tensor: torch.Tensor, source: int, group: Any) -> None:
        self._start_sending(tensor, source, group).wait()
