"""Fully sharded data parallelism: every rank holds its shard; a block is gathered only while it computes.

The scheme is that of ZeRO stage 3 (Rajbhandari et al., 2020) and of torch's ``fully_shard``, on plain tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from nbdist.core.comm import Channel, SharedMemoryChannel
from nbdist.core.params.func_transforms import check_no_transform
from nbdist.core.params.param_data_watch import DataWatch
from nbdist.core.params.placeholder import Placeholders
from nbdist.core.process.memory import memory_is_limited
from nbdist.core.strategies.shard.block import Block
from nbdist.core.strategies.shard.gathered_blocks import GatheredBlocks
from nbdist.core.strategies.shard.mapped_blocks import MappedBlocks
from nbdist.core.strategies.shard.whole_blocks import EVALUATION, TRAINING, WholeBlocks, written_error
from nbdist.errors import PlanError
from nbdist.upstream.torch_private import pytree

__all__ = ["FullySharded"]


class FullySharded:
    """Parameters sharded over a channel, in blocks that are gathered together.

    In forward and backward, a parameter is whole in a gathered block and a placeholder otherwise. If the step or
    another module reads a placeholder, its block is gathered for that. After `expose_shards`, as for the optimizer, it
    is this rank's flat shard, with the gradient of that shard. The `nn.Parameter` objects stay the model's own. Ranks
    may compute different blocks, in any order: those of a model that branches by its data.

    On one host blocks lie in memory that all ranks map (`MappedBlocks`), unless a rank's memory is limited, for
    the limit would count the whole model on each; else they are sent (`GatheredBlocks`). A view that the user keeps
    stays valid. What autograd saves for backward is freed and gathered again: compute inside
    `saving`.

    **Collective**: the constructor shards the parameters, which are whole until then.

    Args:
        blocks: Parameters that are gathered together.
        channel: The ``shard`` axis.
        names: The names of the parameters, for errors.
        check_read: Called before ungathered parameters are read; raises if that is not allowed.
    """

    def __init__(
        self, blocks: list[list[nn.Parameter]], channel: Channel, names: dict[nn.Parameter, str],
        check_read: Callable[[list[nn.Parameter]], None],
    ) -> None:  # fmt: skip
        self._check_read = check_read
        self._registry: dict[int, tuple[Block, int]] = {}
        self._whole: WholeBlocks
        if isinstance(channel, SharedMemoryChannel) and not _any_memory_limit(channel):
            self._whole = MappedBlocks(blocks, channel, names, self._sums_of)
        else:
            self._whole = GatheredBlocks(channel, self._sums_of)
        placeholders = Placeholders(self._read)
        self.blocks = [
            Block(number, parameters, channel.rank, self._whole, names, placeholders, self._registry)
            for number, parameters in enumerate(blocks)
        ]
        self.zero_gradients = False
        self._running = False
        self.used: set[int] = set()
        self._hooks: list[Any] = []
        self._writes: dict[nn.Parameter, int] = {}  # how often each was written within steps
        self._extra: list[Block] = []  # gathered for a read outside their module's forward
        places = [(block, place) for block in self.blocks for place in range(len(block.parameters))]
        parameters = [block.parameters[place] for block, place in places]
        self._watch = DataWatch(parameters, lambda i: places[i][0].taken.add(places[i][1]))

    def _sums_of(self, number: int) -> dict[int, torch.Tensor]:
        return self.blocks[number].sums()

    def hide_shards(self, phase: str = TRAINING) -> None:
        """Turn all parameters into placeholders once all owners have written, before a step. **Collective**."""
        self._whole.begin(phase)
        self.used.clear()
        for block in self.blocks:
            block.hide_shards()

    def expose_shards(self, *, summed: bool = False) -> None:
        """Point every parameter at this rank's shard. Local, but **Collective** with `summed`.

        Args:
            summed: Whether all gradients must have been reduced, as at the end of a step.

        Raises:
            PlanError: A gradient came after its block was reduced, or a weight was written.
        """
        self._extra.clear()
        if summed:
            self._whole.end(TRAINING)
        for block in self.blocks:
            block.expose_shards(summed)

    def take_values(self) -> None:
        """Call after an update: an optimizer may have assigned ``data``. Local."""
        for block in self.blocks:
            block.take_values()

    def settle(self) -> None:
        """See `WholeBlocks`. **Collective**."""
        self._whole.settle()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context for a forward without gradients. **Collective**."""
        self.hide_shards(EVALUATION)
        try:
            yield
            self._whole.end(EVALUATION)
        finally:
            self.expose_shards()

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """Context for forward and backward: autograd saves references in place of gathered parameters. Local."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def begin_backward(self, block: Block) -> None:
        """Gather a block for its backward. **Collective**."""
        block.in_backward = True
        block.gather()

    def end_backward(self, block: Block) -> None:
        """Reduce-scatter a block's gradients over the ranks, and free the block. **Collective**."""
        if not self._running and (name := block.own_gradient()):
            raise PlanError(
                f"the step, or the model's forward, runs a backward of its own into the gradient of parameter {name}, "
                "which a mesh with shard sums over its ranks at once: take gradients with torch.autograd.grad or "
                "backward(inputs=[...]), or use the strategy data."
            )
        block.in_backward = False
        self.used.update(block.reduce(self.zero_gradients))
        block.free()

    def run_backward(
        self, loss: torch.Tensor, unwanted: bool, blocks: Collection[Block] = (), *, retain_graph: bool = False
    ) -> None:
        """Run a backward, with the collectives in it even if its gradients are unwanted. **Collective**.

        Args:
            loss: From where; it may not require grad on this rank.
            unwanted: Whether its gradients count as zero.
            blocks: Blocks that no module of this rank gathers.
            retain_graph: As for ``backward``.
        """
        self.zero_gradients = unwanted
        self._running = True
        try:
            for block in blocks:
                self.begin_backward(block)
            if loss.requires_grad:
                loss.backward(retain_graph=retain_graph)
            self.finish_backward()
        finally:
            self._running = False

    def finish_backward(self) -> None:
        """Reduce the remaining blocks: those whose inputs require no grad, or that other code has read.

        And those that got gradients when theirs had been reduced, as from a gradient within the loss. **Collective**,
        after each backward.
        """
        self._free_extra(())
        for block in reversed(self.blocks):
            if block.in_backward or block.late_gradients or block.own_gradient():
                block.late_gradients = False
                self.end_backward(block)

    def mark_written(self, parameters: Iterable[nn.Parameter]) -> None:
        """Call before an optimizer writes to parameters within a step, whose graphs may need the old ones. Local."""
        for parameter in parameters:
            self._writes[parameter] = self._writes.get(parameter, 0) + 1

    def hook(self, modules: list[nn.Module]) -> None:
        """Register hooks that gather each block while its module computes. Local."""
        for module, block in zip(modules, self.blocks, strict=True):
            before, after = functools.partial(self._before, block), functools.partial(self._after, block)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(after))

    def _before(self, block: Block, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        check_no_transform()
        block.gather()
        if not torch.is_grad_enabled():
            return None
        flat, tree = pytree.tree_flatten((args, kwargs))
        # By id, so that a tensor passed several times stays one: attention tests `query is key`. Not parameters: their
        # gradients are complete only after their last use, which may be outside this block.
        given = {
            id(v): v for v in flat
            if isinstance(v, torch.Tensor) and v.requires_grad and not isinstance(v, nn.Parameter)
        }  # fmt: skip
        if not given:
            block.late_gradients = True
            return None
        ending = functools.partial(self.end_backward, block)
        passed: Any = _AfterBackward.apply(ending, *given.values())  # type: ignore[no-untyped-call]
        instead = dict(zip(given, passed, strict=True))
        return pytree.tree_unflatten([instead.get(id(value), value) for value in flat], tree)

    def _after(self, block: Block, _module: nn.Module, _args: Any, output: Any) -> None:
        if not block.in_backward:  # with activation checkpointing, forward runs again in backward
            block.free()
        hooked = False
        for value in pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
                value.register_hook(lambda _gradient: self.begin_backward(block))
                hooked = True
        block.late_gradients |= not hooked and torch.is_grad_enabled()

    def _read(self, parameters: list[nn.Parameter], data: bool) -> None:
        """Gather placeholders that are about to be read. **Collective**: all ranks must run the same reads."""
        self._check_read(parameters)
        check_no_transform()
        if data:
            block = next(block for block in self.blocks if parameters[0] in block.places)
            raise written_error(block.name(parameters[0]), " (it takes its data; to read, use detach())")
        wanted = [block for block in self.blocks if any(p in block.places for p in parameters)]
        self._free_extra(wanted)
        for block in wanted:
            block.gather()
            block.late_gradients |= torch.is_grad_enabled()
            self._extra.append(block)

    def _free_extra(self, wanted: Collection[Block]) -> None:
        for block in self._extra:
            if block not in wanted and not block.in_backward:
                block.free()
        self._extra.clear()

    def _pack(self, tensor: torch.Tensor) -> Any:
        try:
            found = self._registry.get(tensor.untyped_storage().data_ptr())
        except (NotImplementedError, RuntimeError):  # no storage, for instance sparse
            found = None
        if found is not None and not (tensor.is_conj() or tensor.is_neg()):
            writes = self._writes.get(found[0].parameters[found[1]], 0) if self._writes else 0
            return _Reference(found, writes, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
        # Detached: a saved output would make a reference cycle with its node. `_unpack` checks the version, as torch.
        return tensor if tensor.is_leaf else tensor.detach(), tensor._version

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Reference):
            tensor: torch.Tensor = packed[0]
            if tensor._version != packed[1]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a tensor of shape {list(tensor.shape)} is at version {tensor._version}, and was at version "
                    f"{packed[1]} when it was saved."
                )
            return tensor
        block, place = packed.found
        if self._writes and self._writes.get(block.parameters[place], 0) != packed.writes:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"parameter {block.name(block.parameters[place])} was updated after it was used."
            )
        if not block.gathered:
            self.begin_backward(block)
        view = torch.empty(0, dtype=packed.dtype, device=block.parameters[place].device)
        return view.set_(block.storage(place), packed.offset, packed.size, packed.stride)

    def close(self) -> None:
        """Remove the hooks; parameters stay this rank's shards, without gradients. Local."""
        self._watch.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for block in self.blocks:
            block.close()
        self._whole.close()
        self.blocks.clear()
        self._extra.clear()
        self._registry.clear()


def _any_memory_limit(channel: Channel) -> bool:
    """Whether a limit on memory (``ulimit -v`` or ``-d``) holds for a rank. **Collective**."""
    limited = torch.tensor([float(memory_is_limited())])
    channel.all_reduce_(limited)
    return bool(limited.item())


class _Reference(NamedTuple):
    """What autograd saves in place of a view of a gathered parameter."""

    found: tuple[Block, int]
    writes: int
    dtype: torch.dtype
    offset: Any
    size: Any
    stride: Any


class _AfterBackward(torch.autograd.Function):
    """The identity; calls back when the gradients of all its inputs are computed."""

    @staticmethod
    def forward(ctx: Any, call: Any, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.call()
        return None, *gradients
