"""A channel over several hosts, for tensors on the CPU: shared memory within each, a process group between them.

The first rank of each host is its leader. A sum grows from host to host in rank order: a leader adds what comes from
the host before to its own tensor, its host sums, and passes the result on. The last one sends the total to all, or each
host what its ranks need of it. So a tensor travels once each way between two hosts, however many ranks they have, with
the bits of ranks on one host. A gather takes the tensors of a host to each other host as one message.
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
        store: Where they find each other.
        name: Unique to this channel among the users of `store`.
    """

    def __init__(self, hosts: list[str], rank: int, store: Any, name: str) -> None:
        super().__init__(rank, len(hosts), torch.device("cpu"))
        groups = self.groups(hosts)
        self._leaders = [group[0] for group in groups]
        self._counts = [len(group) for group in groups]
        self._place, group = next((i, group) for i, group in enumerate(groups) if rank in group)
        self._host_of = {other: i for i, group in enumerate(groups) for other in group}
        self._local: Channel = SoloChannel(self.device)
        # Groups of two stand for sending: torch's own messages over gloo can be waited for, but not polled.
        pairs = itertools.pairwise(self._leaders)
        self._links = [start_group(store, functools.partial(dist.new_group, list(pair))) for pair in pairs]
        self._between = start_group(store, lambda: dist.new_group(self._leaders))
        if len(group) > 1:
            self._local = SharedMemoryChannel(rank - group[0], len(group), store, f"{name}/{group[0]}")

    @staticmethod
    def groups(hosts: list[str]) -> list[list[int]]:
        """The ranks of each host; two groups of one host where its ranks do not follow each other."""
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
        if self._place < last:
            self._local.broadcast_(tensor)
        return Done()

    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`; done on return."""
        home = self._host_of[source]
        if self._place == home:
            self._local.broadcast_(tensor, source - self._leaders[home])
        if self._local.rank == 0:
            self._send(tensor, self._leaders[home], self._between)
        if self._place != home:
            self._local.broadcast_(tensor)
        return Done()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Channel`; between the hosts as bytes, for gloo does not send every dtype."""
        gathered = tensor.new_empty((self.size, *tensor.shape))
        hosts = gathered.split(self._counts)
        torch.stack(self._local.all_gather(tensor), out=hosts[self._place])
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
        here: torch.Tensor = total.split(sizes)[self._place]
        if self._local.rank == 0:
            nothing = [0] * len(sizes)
            if self._place == last:
                received, given, come, go = here[:0], total[: -sizes[last]], nothing, [*sizes[:last], 0]
            else:
                received, given, come, go = here, total[:0], [*nothing[:last], sizes[self._place]], nothing
            group = self._between
            Work.launch(lambda: dist.all_to_all_single(received, given, come, go, group=group, async_op=True)).wait()
        if self._place < last:
            self._local.broadcast_(here)
        return here.view(self._local.size, -1)[self._local.rank].clone()

    def close(self) -> None:
        """See `Channel.close`."""
        self._local.close()
        self._links, self._between = [], None  # or the groups' sockets would stay open

    def _sum_up_to_here_(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by the sum over this host and all before it, and pass that on to the next host."""
        leader = self._local.rank == 0
        if leader and self._place > 0:
            before = torch.empty_like(tensor)
            self._send(before, self._leaders[self._place - 1], self._links[self._place - 1])
            torch.add(before, tensor, out=tensor)
        self._local.all_reduce_(tensor)
        if leader and self._place < len(self._leaders) - 1:
            self._send(tensor, self.rank, self._links[self._place])

    def _start_sending(self, tensor: torch.Tensor, source: int, group: Any) -> Work:
        """Begin to give the ranks of `group` the tensor of rank `source`."""
        return Work.launch(lambda: dist.broadcast(tensor, source, group=group, async_op=True))

    def _send(self, tensor: torch.Tensor, source: int, group: Any) -> None:
        self._start_sending(tensor, source, group).wait()
