"""Data parallelism on one host with shared memory: one copy of the weights, of which each rank updates a part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from nbdist.core.comm import SharedMemoryChannel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.param_data_watch import DataWatch, get_data, set_data
from nbdist.core.params.param_table import view_like
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import ControlFlags
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.owner_reducer import OwnerReducer, aligned_starts
from nbdist.core.sync.slice_accumulator import PlainAccumulator, TreeAccumulator
from nbdist.core.sync.step_tail import Totals
from nbdist.core.task.task import Task
from nbdist.errors import TaskError
from nbdist.plan import Plan

__all__ = ["SharedWeights"]


class SharedWeights(Strategy):
    """The same bits as `DataParallel`, with the weights in memory that all ranks map.

    Every trainable parameter has an owner: the rank that sums its gradient (`OwnerReducer`), holds its optimizer state
    and writes it. So the sum and the optimizer's work are split over the ranks (as in ZeRO stage 1), no rank copies
    weights, and N ranks need the memory of one copy.

    A forward, or a step, may write to weights, for instance to clamp them. All ranks would write to the same memory
    while others read it. So in the first step each rank computes on private pages. A parameter that is written there,
    or whose ``data`` is taken at any time, stays in private memory. As with replicas, all ranks then write the same
    values, and copy the owner's after each update.

    It needs optimizers that update each parameter by itself, as those of torch.optim do, and no use of all
    gradients together, such as clipping by their norm.

    **Collective**: the constructor broadcasts the weights and buffers of rank 0.

    Args:
        task: See `Strategy`; its model is on the CPU.
        plan: See `Strategy`.
        axes: See `Strategy`.
        hooks: See `Strategy`.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels, hooks: GradientHooks | None = None) -> None:
        super().__init__(task, plan, axes, hooks)
        channel, parameters = axes.dp, list(self.table.trainable.values())
        assert isinstance(channel, SharedMemoryChannel)
        owners = _owners([parameter.numel() for parameter in parameters], channel.size)
        self.reducer = OwnerReducer(
            parameters, owners, channel,
            TreeAccumulator(parameters, list(self.table.buffers.values()), channel, plan.slices)
            if plan.reproducible else PlainAccumulator(parameters, channel),
            full_batch=plan.batch_size,
        )  # fmt: skip
        self._channel = channel
        self._parameters = parameters
        self.table.owners.update(zip(self.table.trainable, owners, strict=True))
        self._owned = [i for i, owner in enumerate(owners) if owner == channel.rank]
        self._foreign = [i for i, owner in enumerate(owners) if owner != channel.rank]
        self._shared_views: dict[int, torch.Tensor] = {}  # the views that all ranks read
        self._private_pages: dict[int, torch.Tensor] = {}  # the same on private pages, for the first step only
        self._private: set[int] = set()  # parameters in private memory
        self._data_taken: set[int] = set()  # of those, whose `data` was taken
        self._versions: list[int] = []  # of all, after this rank's last expected write
        self._updated = False  # whether owners have written since the last barrier
        with torch.no_grad():
            for name, tensor in self.table.tensors.items():
                if name not in self.table.trainable:
                    channel.broadcast_any_(tensor)
            for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
                self._share(dtype)
        channel.barrier()  # rank 0's weights are in place
        self._watch = DataWatch(parameters, self._on_data_access)

    def _share(self, dtype: torch.dtype) -> None:
        """Move the parameters of a dtype into shared memory. **Collective**."""
        members = [i for i, parameter in enumerate(self._parameters) if parameter.dtype is dtype]
        starts = aligned_starts(self._parameters[i].numel() for i in members)
        weights, private = self._channel.common(starts[-1], dtype)
        for i, start in zip(members, starts, strict=False):
            parameter = self._parameters[i]
            shared = self._shared_views[i] = view_like(parameter, weights, start)
            self._private_pages[i] = view_like(parameter, private, start)
            if self._channel.rank == 0:
                shared.copy_(parameter)
            parameter.data = shared

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._wait_for_owners()  # all ranks have read this rank's slab and written the weights they own
        if not self._versions:
            self._use_private_pages()
        super().begin_step()

    def sync(self, flags: ControlFlags) -> Totals:
        """See `Strategy`. A rank gets the gradients of the parameters it owns; the others are None and not updated."""
        with torch.no_grad():
            self._check_writes()
        return super().sync(flags)

    def update(self, compute_again: Callable[[], torch.Tensor]) -> bool:
        """See `Strategy`."""
        self._updated = super().update(compute_again)
        self._share_owned()
        return self._updated

    def write(self, parts: Mapping[str, torch.Tensor]) -> None:
        """See `Strategy`."""
        self._wait_for_owners()  # all ranks have read the weights
        super().write(parts)
        self._share_owned()
        self._updated = True
        self._wait_for_owners()

    def _share_owned(self) -> None:
        for i in self._owned:
            if i in self._private:
                self._shared_views[i].copy_(get_data(self._parameters[i]))
            if self._versions:  # else there has been no step
                self._versions[i] = self._parameters[i]._version

    @contextlib.contextmanager
    def trial(self, scale: float) -> Iterator[None]:
        """See `Strategy`. Every rank computes on a copy of the weights meanwhile."""
        pages, self._private_pages = self._private_pages, {}
        for i, parameter in enumerate(self._parameters):
            set_data(parameter, self._shared_views[i].clone())
        self._private.update(self._shared_views)
        self._versions = [parameter._version for parameter in self._parameters]
        try:
            with super().trial(scale):
                yield
        finally:
            for i, parameter in enumerate(self._parameters):
                set_data(parameter, self._shared_views[i])
            self._private_pages, self._versions = pages, []
            self._private.clear()
            self._data_taken.clear()

    def average_buffers(self) -> None:
        """See `Strategy`."""
        self._wait_for_owners()  # all ranks have written the weights they own
        super().average_buffers()

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        self.reducer.close()
        self._watch.close()
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
        self._shared_views.clear()
        self._private_pages.clear()

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


def _owners(sizes: list[int], ranks: int) -> list[int]:
    """An owner for each size, balanced greedily: the largest first, to the rank that owns least."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners
