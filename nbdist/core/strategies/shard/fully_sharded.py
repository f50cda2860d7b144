"""Fully sharded parameters: every rank keeps its part, and the whole of a block only while the block computes.

The scheme is that of ZeRO's third stage (Rajbhandari et al., 2020) and of torch's ``fully_shard``, on plain tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from nbdist.core.comm import Channel
from nbdist.core.params.data_watch import DataWatch
from nbdist.core.params.placeholder import Placeholders
from nbdist.core.strategies.shard.block import Block, written

__all__ = ["FullySharded"]


class FullySharded:
    """Parameters dealt out over a channel, in blocks that are gathered together.

    While the model computes, a parameter is whole in a gathered block and a placeholder otherwise; one that is read
    all the same, by the step or by a module that it does not belong to, is gathered for that. Outside of that
    (`show`) it is this rank's flat part, with the gradient of that part: so the optimizer sees it. The objects are
    the model's own all the time. All ranks must compute the same blocks in the same order, forward and backward.

    What is gathered lies in memory of its own each time, so that a view of it that somebody keeps stays what it is.
    Only what autograd saves for backward is not kept but gathered again: compute inside of `saving`.

    **Collective**: the constructor keeps this rank's parts of what is whole now.

    Args:
        blocks: Parameters that are gathered together.
        channel: The ``shard`` axis.
        names: What the parameters are called in errors.
        check_read: Raises where parameters may not be read that nobody has gathered.
    """

    def __init__(
        self, blocks: list[list[nn.Parameter]], channel: Channel, names: dict[nn.Parameter, str],
        check_read: Callable[[list[nn.Parameter]], None],
    ) -> None:  # fmt: skip
        self._check_read = check_read
        self._homes: dict[int, tuple[Block, int]] = {}
        placeholders = Placeholders(self._read)
        self.blocks = [
            Block(number, parameters, channel, names, placeholders, self._homes)
            for number, parameters in enumerate(blocks)
        ]
        self.silent = False
        self.used: set[int] = set()
        self._hooks: list[Any] = []
        self._lent: list[Block] = []  # gathered because somebody read them, and not for their module
        places = [(block, place) for block in self.blocks for place in range(len(block.parameters))]
        parameters = [block.parameters[place] for block, place in places]
        self._watch = DataWatch(parameters, lambda i: places[i][0].taken.add(places[i][1]))

    def hide(self) -> None:
        """Begin to compute: nothing is there that is not gathered. Local."""
        self.used.clear()
        for block in self.blocks:
            block.hide()

    def show(self, *, summed: bool = False) -> None:
        """Let every parameter be this rank's part. Local.

        Args:
            summed: Whether all gradients have to be.

        Raises:
            PlanError: They have to, and one of them came when nobody awaited it any more.
        """
        self._lent.clear()
        if summed:
            for block in self.blocks:
                block.check_order()
        for block in self.blocks:
            block.show(summed)

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """While forward and backward compute: autograd saves of what is gathered only where to find it again. Local."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def begin_backward(self, block: Block) -> None:
        """Gather a block for its backward. **Collective**."""
        block.awaited = True
        block.gather()

    def end_backward(self, block: Block) -> None:
        """Sum a block's gradients over the ranks, each of which keeps its part. **Collective**."""
        block.awaited = False
        self.used.update(block.reduce(self.silent))
        block.free()

    def finish_backward(self) -> None:
        """Sum what backward has left: blocks whose inputs take no gradient, or that others have read.

        **Collective**, after each backward.
        """
        self._take_back(())
        for block in reversed(self.blocks):
            if block.awaited or block.read:
                block.read = False
                self.end_backward(block)

    def hook(self, modules: list[nn.Module]) -> None:
        """Gather each block while its module of `modules` computes. Local."""
        for module, block in zip(modules, self.blocks, strict=True):
            before, after = functools.partial(self._before, block), functools.partial(self._after, block)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(after))

    def _before(self, block: Block, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        block.gather()
        if not torch.is_grad_enabled():
            return None
        flat, tree = pytree.tree_flatten((args, kwargs))
        # One given several times stays one: attention asks whether its query is its key. A parameter's gradient is
        # there only after that of its last use, which this block need not be.
        given = {
            id(v): v for v in flat
            if isinstance(v, torch.Tensor) and v.requires_grad and not isinstance(v, nn.Parameter)
        }  # fmt: skip
        if not given:
            block.read = True
            return None
        ending = functools.partial(self.end_backward, block)
        passed: Any = _AfterBackward.apply(ending, *given.values())  # type: ignore[no-untyped-call]
        instead = dict(zip(given, passed, strict=True))
        return pytree.tree_unflatten([instead.get(id(value), value) for value in flat], tree)

    def _after(self, block: Block, _module: nn.Module, _args: Any, output: Any) -> None:
        if not block.awaited:  # a checkpointed one computes once more in its backward
            block.free()
        hooked = False
        for value in pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
                value.register_hook(lambda _gradient: self.begin_backward(block))
                hooked = True
        block.read |= not hooked and torch.is_grad_enabled()

    def _read(self, parameters: list[nn.Parameter], data: bool) -> None:
        """Somebody is about to compute with parameters that are not gathered. **Collective**, as all that is."""
        self._check_read(parameters)
        if data:
            block = next(block for block in self.blocks if parameters[0] in block.places)
            raise written(block.name(parameters[0]), " (it takes its data, where detach() lets one read)")
        wanted = [block for block in self.blocks if any(p in block.places for p in parameters)]
        self._take_back(wanted)
        for block in wanted:
            block.gather()
            block.read |= torch.is_grad_enabled()
            self._lent.append(block)

    def _take_back(self, wanted: Collection[Block]) -> None:
        for block in self._lent:
            if block not in wanted and not block.awaited:
                block.free()
        self._lent.clear()

    def _pack(self, tensor: torch.Tensor) -> Any:
        try:
            found = self._homes.get(tensor.untyped_storage().data_ptr())
        except (NotImplementedError, RuntimeError):  # a sparse one, say, has no storage
            found = None
        if found is not None and not (tensor.is_conj() or tensor.is_neg()):
            return _Whereabouts(found, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
        # Without its history: an output would keep the node alive that keeps it. The version is what torch looks at.
        return tensor if tensor.is_leaf else tensor.detach(), tensor._version

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Whereabouts):
            tensor: torch.Tensor = packed[0]
            if tensor._version != packed[1]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a tensor of shape {list(tensor.shape)} is at version {tensor._version}, and was at version "
                    f"{packed[1]} when it was saved."
                )
            return tensor
        block, place = packed.found
        if not block.gathered:
            self.begin_backward(block)
        home = torch.empty(0, dtype=packed.dtype, device=block.parameters[place].device)
        return home.set_(block.storage(place), packed.offset, packed.size, packed.stride)

    def close(self) -> None:
        """Take the hooks away; parameters stay the parts they are, without gradients. Local."""
        self._watch.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.blocks.clear()
        self._lent.clear()
        self._homes.clear()


class _Whereabouts(NamedTuple):
    """What autograd keeps of a tensor that lies in a gathered parameter."""

    found: tuple[Block, int]
    dtype: torch.dtype
    offset: Any
    size: Any
    stride: Any


class _AfterBackward(torch.autograd.Function):
    """The identity; calls back when the gradients of all its inputs are there."""

    @staticmethod
    def forward(ctx: Any, call: Any, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.call()
        return None, *gradients
