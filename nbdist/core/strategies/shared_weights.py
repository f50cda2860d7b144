"""Data parallelism on one host: replicas that share one copy of the weights, and each rank updates its part of it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from nbdist.core.comm import SharedMemoryChannel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.params.data_watch import DataWatch, put_data, unwatched
from nbdist.core.params.table import copy_or_zero_, laid_out_like
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.gradient_sync import COUNTS, ControlFlags, Totals, tail_dtype
from nbdist.core.task.task import Task
from nbdist.errors import TaskError
from nbdist.plan import Plan

__all__ = ["SharedWeights"]

_ALIGNMENT = 16  # elements: each parameter begins a cache line, as one of its own would


class SharedWeights(Strategy):
    """What `DataParallel` does, to the same bits, where all ranks map the same memory.

    The trainable parameters lie in memory that all ranks read. Every parameter has an owner: the rank that sums its
    gradient, keeps its optimizer state and writes it. The others put their gradient of it into their slab, where the
    owner reads it. So the sum and the optimizer's work are split over the ranks, nobody copies weights, and N ranks
    need the memory of one copy.

    A forward, or a step, may write to weights, as one that keeps them in bounds does. Each rank would do so to the
    same memory, while others read it. So in the first step each computes on pages of its own, and what it writes to
    there, or where somebody takes its ``data`` at any time, stays in memory of its own: as with replicas, all ranks
    write alike, and what its owner makes of it goes to all after each update.

    It takes an optimizer that treats each parameter by itself, as those of torch.optim do, and gradients that nobody
    needs as a whole, as clipping would.

    **Collective**: the constructor gives every rank the weights and buffers of rank 0.

    Args:
        task: See `Strategy`; its model lies on the CPU.
        plan: See `Strategy`.
        axes: See `Strategy`.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels) -> None:
        super().__init__(task, plan, axes)
        channel = axes.dp
        assert isinstance(channel, SharedMemoryChannel)
        self._channel = channel
        self._parameters = list(self.table.trainable.values())
        owners = _owners([parameter.numel() for parameter in self._parameters], channel.size)
        self.table.owners.update(zip(self.table.trainable, owners, strict=True))
        self._owned = [i for i, owner in enumerate(owners) if owner == channel.rank]
        self._foreign = [i for i, owner in enumerate(owners) if owner != channel.rank]
        self._arenas: list[torch.Tensor] = []
        self._homes: dict[int, torch.Tensor] = {}  # where all ranks read a parameter
        self._alone: dict[int, torch.Tensor] = {}  # the same on pages of this rank's own, until the first step is done
        self._own: set[int] = set()  # what lies in memory of this rank's own
        self._taken: set[int] = set()  # of that, whose data somebody has taken
        self._versions: list[int] = []  # of all, when this rank last was to write to them
        self._updated = False  # whether owners have written since all have met
        self._order = ReductionTree.chain(channel.size) if self.sums is None else self.sums.order
        # The places of each parameter's gradients in the slab of each rank: one for each node of the order.
        self._slabs: list[list[dict[int, torch.Tensor]]] = [
            [{} for _ in range(self._order.rows)] for _ in range(channel.size)
        ]
        with torch.no_grad():
            for name, tensor in self.table.tensors.items():
                if name not in self.table.trainable:
                    channel.broadcast_any_(tensor)
            dtypes = list(dict.fromkeys(parameter.dtype for parameter in self._parameters))
            for dtype in dtypes:
                self._lay_out(dtype)
        length = COUNTS + len(self._parameters) if self.sums is None else self.sums.numel
        self._tail = channel.zeros(length, tail_dtype(dtypes))
        self._arenas.append(self._tail)
        channel.barrier()  # rank 0's weights are in place
        self._watch = DataWatch(self._parameters, self._take)

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Move the parameters of a dtype into shared memory, and give their gradients places in the slabs."""
        members = [i for i, parameter in enumerate(self._parameters) if parameter.dtype is dtype]
        starts = list(itertools.accumulate((_aligned(self._parameters[i].numel()) for i in members), initial=0))
        (weights, alone), rows = self._channel.common(starts[-1], dtype), self._order.rows
        gradients = self._channel.zeros(rows * starts[-1], dtype)
        self._arenas.append(gradients)
        for i, start in zip(members, starts, strict=False):
            parameter = self._parameters[i]
            home = self._homes[i] = laid_out_like(parameter, weights, start)
            self._alone[i] = laid_out_like(parameter, alone, start)
            if self._channel.rank == 0:
                home.copy_(parameter)
            for places, slab in zip(self._slabs, self._channel.slabs(gradients), strict=True):
                for views, row in zip(places, slab.view(rows, starts[-1]), strict=True):
                    views[i] = laid_out_like(parameter, row, start)
            parameter.data = home

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._meet()  # all have read my slab, and written the weights they own
        if not self._versions:
            self._begin_alone()
        if self.sums is not None:
            self.sums.begin()
            return
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def sync(self, weight: Any, flags: ControlFlags, loss: tuple[Any, Any] = (0.0, 0.0)) -> Totals:
        """See `Strategy`. A rank then has gradients of what it owns only; an optimizer leaves alone what has none."""
        parameters, channel = self._parameters, self._channel
        self._look_for_writes()
        if self.sums is None:
            nodes = [[parameter.grad for parameter in parameters]]
            used = [gradient is not None for gradient in nodes[0]]
            self._tail.copy_(torch.tensor([float(weight), *loss, *flags, *used], dtype=self._tail.dtype))
        else:
            nodes = self.sums.sums()
            self.sums.pack(flags, self._tail)
        for mine, gradients in zip(self._slabs[channel.rank], nodes, strict=False):
            copy_or_zero_([mine[i] for i in self._foreign], [gradients[i] for i in self._foreign])
        for i in self._foreign:
            parameters[i].grad = None
        channel.barrier()  # everybody's gradients are in place

        first, *others = channel.slabs(self._tail)
        tail = functools.reduce(torch.add, others, first)
        if self.sums is None:
            totals, counts = Totals(tail[:COUNTS]), tail[COUNTS:].tolist() if not all(used) else [1.0] * len(used)
        else:
            totals, counts = self.sums.unpack(tail)
        owned = [i for i in self._owned if counts[i]]
        if owned:
            sums = self._sums(owned, nodes)
            factor = totals.weight / self.plan.batch_size
            if factor not in (0.0, 1.0):
                torch._foreach_div_(sums, factor)
            for i, gradient in zip(owned, sums, strict=True):
                parameters[i].grad = gradient
        return totals

    def _sums(self, owned: list[int], nodes: list[list[torch.Tensor | None]]) -> list[torch.Tensor]:
        """The gradients of owned parameters, summed over all nodes in their order; made in place of the first."""
        parameters = self._parameters
        terms = [[[views[i] for i in owned] for views in places] for places in self._slabs]
        terms[self._channel.rank] = [
            [torch.zeros_like(parameters[i]) if (g := gradients[i]) is None else g for i in owned]
            for gradients in nodes
        ]
        return self._order.total(terms, _plus)

    def update(self, optimizer: torch.optim.Optimizer, hooks: GradientHooks) -> bool:
        """See `Strategy`."""
        self._updated = super().update(optimizer, hooks)
        for i in self._owned:
            if i in self._own:
                self._homes[i].copy_(unwatched(self._parameters[i]))
            self._versions[i] = self._parameters[i]._version
        return self._updated

    def share_buffers(self) -> None:
        """See `Strategy`."""
        self._meet()  # all have written the weights they own
        super().share_buffers()

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        self._watch.close()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.data = parameter.data.clone()
        self._homes.clear()
        self._alone.clear()
        for arena in self._arenas:
            self._channel.free(arena)

    # What forward, or the step, writes to weights.

    def _meet(self) -> None:
        """Wait for what owners write; what lies in memory of this rank's own follows it. **Collective**."""
        self._channel.barrier()
        if self._updated:
            for i in self._own.intersection(self._foreign):
                unwatched(self._parameters[i]).copy_(self._homes[i])
        self._updated = False

    def _begin_alone(self) -> None:
        """Let this rank write what it likes in its first step."""
        for i, parameter in enumerate(self._parameters):
            if i not in self._own:
                put_data(parameter, self._alone[i])
        self._own.update(self._homes)
        self._versions = [parameter._version for parameter in self._parameters]

    def _take(self, i: int) -> None:
        """Somebody is about to have the data of a parameter, or to replace it."""
        self._taken.add(i)
        if i not in self._own:
            self._own.add(i)
            put_data(self._parameters[i], self._homes[i].clone())

    def _look_for_writes(self) -> None:
        """Forward and backward are over: let weights be shared that nobody has written to, and stay so.

        Raises:
            TaskError: Somebody has written to one that is shared, or to one so that it is something else.
        """
        if self._alone:  # the first step
            for i, parameter in enumerate(self._parameters):
                same = parameter._version == self._versions[i] and i not in self._taken
                if same and torch.equal(parameter, self._homes[i]):
                    put_data(parameter, self._homes[i])
                    self._own.discard(i)
            self._alone.clear()
        if self._own or [parameter._version for parameter in self._parameters] != self._versions:
            for i, name in enumerate(self.table.trainable):
                self._check(i, name)

    def _check(self, i: int, name: str) -> None:
        parameter, home = self._parameters[i], self._homes[i]
        if (parameter.shape, parameter.dtype) != (home.shape, home.dtype):
            raise TaskError(
                f"the model's forward, or the step, makes parameter {name} one of shape {list(parameter.shape)} and "
                f"{parameter.dtype}, where it had {list(home.shape)} and {home.dtype}: let it keep both."
            )
        if i not in self._own and parameter._version != self._versions[i]:
            raise TaskError(
                f"the model's forward, or the step, writes to parameter {name} in place, as it did not do in the first "
                f"step, and all ranks read it there: write to {name}.data, which is noticed before."
            )


def _plus(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_add_(left, right)
    return left


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


def _owners(sizes: list[int], ranks: int) -> list[int]:
    """An owner for each size, so that ranks own about the same: the largest first, to whom owns least."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
