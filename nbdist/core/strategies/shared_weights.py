"""Data parallelism on one host with shared memory: one copy of the weights, of which each rank updates a part."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from nbdist.core.comm import SharedMemoryChannel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.params.param_data_watch import DataWatch, get_data, set_data
from nbdist.core.params.param_table import copy_or_zero_, view_like
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.gradient_sync import COUNTS, ControlFlags, Totals, tail_dtype
from nbdist.core.task.task import Task
from nbdist.errors import TaskError
from nbdist.plan import Plan

__all__ = ["SharedWeights"]

_ALIGNMENT = 16  # elements: each parameter begins a cache line, as a tensor with its own memory would


class SharedWeights(Strategy):
    """The same bits as `DataParallel`, with the weights in memory that all ranks map.

    Every trainable parameter has an owner: the rank that sums its gradient, holds its optimizer state and writes it.
    The other ranks put their gradient of it into their slab, where the owner reads it. So the sum and the optimizer's
    work are split over the ranks (as in ZeRO stage 1), no rank copies weights, and N ranks need the memory of one copy.

    A forward, or a step, may write to weights, for instance to clamp them. All ranks would write to the same memory
    while others read it. So in the first step each rank computes on private pages. A parameter that is written there,
    or whose ``data`` is taken at any time, stays in private memory. As with replicas, all ranks then write the same
    values, and copy the owner's after each update.

    It needs an optimizer that updates each parameter by itself, as those of torch.optim do, and no use of all
    gradients together, such as clipping by their norm.

    **Collective**: the constructor broadcasts the weights and buffers of rank 0.

    Args:
        task: See `Strategy`; its model is on the CPU.
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
        self._shared_views: dict[int, torch.Tensor] = {}  # the views that all ranks read
        self._private_pages: dict[int, torch.Tensor] = {}  # the same on private pages, for the first step only
        self._private: set[int] = set()  # parameters in private memory
        self._data_taken: set[int] = set()  # of those, whose `data` was taken
        self._versions: list[int] = []  # of all, after this rank's last expected write
        self._updated = False  # whether owners have written since the last barrier
        self._tree = ReductionTree.chain(channel.size) if self.accumulator is None else self.accumulator.tree
        # Views for each parameter's gradients in the slab of each rank: one for each tree node that a rank sums.
        self._slabs: list[list[dict[int, torch.Tensor]]] = [
            [{} for _ in range(self._tree.rows)] for _ in range(channel.size)
        ]
        with torch.no_grad():
            for name, tensor in self.table.tensors.items():
                if name not in self.table.trainable:
                    channel.broadcast_any_(tensor)
            dtypes = list(dict.fromkeys(parameter.dtype for parameter in self._parameters))
            for dtype in dtypes:
                self._lay_out(dtype)
        length = COUNTS + len(self._parameters) if self.accumulator is None else self.accumulator.numel
        self._tail = channel.zeros(length, tail_dtype(dtypes))
        self._arenas.append(self._tail)
        channel.barrier()  # rank 0's weights are in place
        self._watch = DataWatch(self._parameters, self._on_data_access)

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Move the parameters of a dtype into shared memory, and make views for their gradients in the slabs."""
        members = [i for i, parameter in enumerate(self._parameters) if parameter.dtype is dtype]
        starts = list(itertools.accumulate((_aligned(self._parameters[i].numel()) for i in members), initial=0))
        (weights, private), rows = self._channel.common(starts[-1], dtype), self._tree.rows
        gradients = self._channel.zeros(rows * starts[-1], dtype)
        self._arenas.append(gradients)
        for i, start in zip(members, starts, strict=False):
            parameter = self._parameters[i]
            shared = self._shared_views[i] = view_like(parameter, weights, start)
            self._private_pages[i] = view_like(parameter, private, start)
            if self._channel.rank == 0:
                shared.copy_(parameter)
            for places, slab in zip(self._slabs, self._channel.slabs(gradients), strict=True):
                for views, row in zip(places, slab.view(rows, starts[-1]), strict=True):
                    views[i] = view_like(parameter, row, start)
            parameter.data = shared

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._wait_for_owners()  # all ranks have read this rank's slab and written the weights they own
        if not self._versions:
            self._use_private_pages()
        if self.accumulator is not None:
            self.accumulator.begin_step()
            return
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def sync(self, weight: Any, flags: ControlFlags, loss: tuple[Any, Any] = (0.0, 0.0)) -> Totals:
        """See `Strategy`. A rank gets the gradients of the parameters it owns; the others are None and not updated."""
        parameters, channel = self._parameters, self._channel
        self._check_writes()
        if self.accumulator is None:
            nodes = [[parameter.grad for parameter in parameters]]
            used = [gradient is not None for gradient in nodes[0]]
            self._tail.copy_(torch.tensor([float(weight), *loss, *flags, *used], dtype=self._tail.dtype))
        else:
            nodes = self.accumulator.node_sums()
            self.accumulator.pack(flags, self._tail)
        for mine, gradients in zip(self._slabs[channel.rank], nodes, strict=False):
            copy_or_zero_([mine[i] for i in self._foreign], [gradients[i] for i in self._foreign])
        for i in self._foreign:
            parameters[i].grad = None
        channel.barrier()  # the gradients of all ranks are in their slabs

        first, *others = channel.slabs(self._tail)
        tail = functools.reduce(torch.add, others, first)
        if self.accumulator is None:
            totals, counts = Totals(tail[:COUNTS]), tail[COUNTS:].tolist() if not all(used) else [1.0] * len(used)
        else:
            totals, counts = self.accumulator.unpack(tail)
        owned = [i for i in self._owned if counts[i]]
        if owned:
            sums = self._sum_owned(owned, nodes)
            factor = totals.weight / self.plan.batch_size
            if factor not in (0.0, 1.0):
                torch._foreach_div_(sums, factor)
            for i, gradient in zip(owned, sums, strict=True):
                parameters[i].grad = gradient
        return totals

    def _sum_owned(self, owned: list[int], nodes: list[list[torch.Tensor | None]]) -> list[torch.Tensor]:
        """The gradients of owned parameters, summed over all tree nodes in reduction order, in place of the first."""
        parameters = self._parameters
        terms = [[[views[i] for i in owned] for views in places] for places in self._slabs]
        terms[self._channel.rank] = [
            [torch.zeros_like(parameters[i]) if (g := gradients[i]) is None else g for i in owned]
            for gradients in nodes
        ]
        return self._tree.total(terms, _add)

    def update(self, optimizer: torch.optim.Optimizer, hooks: GradientHooks) -> bool:
        """See `Strategy`."""
        self._updated = super().update(optimizer, hooks)
        for i in self._owned:
            if i in self._private:
                self._shared_views[i].copy_(get_data(self._parameters[i]))
            self._versions[i] = self._parameters[i]._version
        return self._updated

    def average_buffers(self) -> None:
        """See `Strategy`."""
        self._wait_for_owners()  # all ranks have written the weights they own
        super().average_buffers()

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        self._watch.close()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.data = parameter.data.clone()
        self._shared_views.clear()
        self._private_pages.clear()
        for arena in self._arenas:
            self._channel.free(arena)

    # Writes to weights in forward or in the step.

    def _wait_for_owners(self) -> None:
        """Wait until owners have written, and copy their values into this rank's private memory. **Collective**."""
        self._channel.barrier()
        if self._updated:
            for i in self._private.intersection(self._foreign):
                get_data(self._parameters[i]).copy_(self._shared_views[i])
        self._updated = False

    def _use_private_pages(self) -> None:
        """Put all parameters on private pages, to find out in the first step which ones are written."""
        for i, parameter in enumerate(self._parameters):
            if i not in self._private:
                set_data(parameter, self._private_pages[i])
        self._private.update(self._shared_views)
        self._versions = [parameter._version for parameter in self._parameters]

    def _on_data_access(self, i: int) -> None:
        """A caller is about to read or replace the ``data`` of a parameter: move it into private memory."""
        self._data_taken.add(i)
        if i not in self._private:
            self._private.add(i)
            set_data(self._parameters[i], self._shared_views[i].clone())

    def _check_writes(self) -> None:
        """After forward and backward: share the weights that were not written, and check those that are shared.

        Raises:
            TaskError: A shared parameter was written, or a private one has another shape or dtype.
        """
        if self._private_pages:  # the first step
            for i, parameter in enumerate(self._parameters):
                same = parameter._version == self._versions[i] and i not in self._data_taken
                if same and torch.equal(parameter, self._shared_views[i]):
                    set_data(parameter, self._shared_views[i])
                    self._private.discard(i)
            self._private_pages.clear()
        if self._private or [parameter._version for parameter in self._parameters] != self._versions:
            for i, name in enumerate(self.table.trainable):
                self._check_parameter(i, name)

    def _check_parameter(self, i: int, name: str) -> None:
        parameter, shared = self._parameters[i], self._shared_views[i]
        if (parameter.shape, parameter.dtype) != (shared.shape, shared.dtype):
            raise TaskError(
                f"the model's forward, or the step, changes parameter {name} to shape {list(parameter.shape)} and "
                f"{parameter.dtype}, from {list(shared.shape)} and {shared.dtype}: keep both unchanged."
            )
        if i not in self._private and parameter._version != self._versions[i]:
            raise TaskError(
                f"the model's forward, or the step, writes to parameter {name} in place, but did not in the first "
                f"step, and all ranks share its memory: write to {name}.data, which nbdist detects in time."
            )


def _add(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_add_(left, right)
    return left


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


def _owners(sizes: list[int], ranks: int) -> list[int]:
    """An owner for each size, balanced greedily: the largest first, to the rank that owns least."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
