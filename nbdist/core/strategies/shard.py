"""Fully sharded parameters: every rank keeps its part, and the whole of a block only while the block computes.

The scheme is that of ZeRO's third stage (Rajbhandari et al., 2020) and of torch's ``fully_shard``, on plain tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nbdist.core.channels import Channel
from nbdist.core.params import stand_in
from nbdist.core.placement import shard_of
from nbdist.core.splitting.untouched import untouched

__all__ = ["BLOCKS", "Shards", "blocks_of"]

BLOCKS = 8
"""A block holds at most this fraction of all parameters, where the model's tree allows it."""


class Shards:
    """Parameters dealt out over a channel, in blocks that are gathered together.

    While the model computes, a parameter is whole in a gathered block and a stand-in otherwise. Outside of that
    (`show`) it is this rank's flat part, with the gradient of that part: so the optimizer sees it. The objects are
    the model's own all the time. All ranks must compute the same blocks in the same order, forward and backward.

    **Collective**: the constructor keeps this rank's parts of what is whole now.

    Args:
        blocks: Parameters that are gathered together.
        channel: The ``shard`` axis.
    """

    def __init__(self, blocks: list[list[nn.Parameter]], channel: Channel) -> None:
        self.blocks = [_Block(parameters, channel) for parameters in blocks]
        self.silent = False
        self.used: set[int] = set()
        self._hooks: list[Any] = []

    def hide(self) -> None:
        """Begin to compute: nothing is there that is not gathered. Local."""
        self.used.clear()
        for block in self.blocks:
            block.hide()

    def show(self) -> None:
        """Let every parameter be this rank's part. Local."""
        for block in self.blocks:
            block.show()

    def begin_backward(self, block: _Block) -> None:
        """Gather a block for its backward. **Collective**."""
        block.awaited = True
        block.gather()

    def end_backward(self, block: _Block) -> None:
        """Sum a block's gradients over the ranks, each of which keeps its part. **Collective**."""
        block.awaited = False
        self.used.update(block.reduce(self.silent))
        block.free()

    def finish_backward(self) -> None:
        """Sum what backward has left: blocks whose inputs take no gradient. **Collective**, after each backward."""
        for block in reversed(self.blocks):
            if block.awaited:
                self.end_backward(block)

    def hook(self, modules: list[nn.Module]) -> None:
        """Gather each block while its module of `modules` computes. Local."""
        for module, block in zip(modules, self.blocks, strict=True):
            before, after = functools.partial(self._before, block), functools.partial(self._after, block)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(after))

    def _before(self, block: _Block, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        block.gather()
        if not torch.is_grad_enabled():
            return None
        flat, tree = pytree.tree_flatten((args, kwargs))
        # One given several times stays one: attention asks whether its query is its key.
        given = {id(v): v for v in flat if isinstance(v, torch.Tensor) and v.requires_grad}
        if not given:
            return None
        ending = functools.partial(self.end_backward, block)
        passed: Any = _AfterBackward.apply(ending, *given.values())  # type: ignore[no-untyped-call]
        instead = dict(zip(given, passed, strict=True))
        return pytree.tree_unflatten([instead.get(id(value), value) for value in flat], tree)

    def _after(self, block: _Block, _module: nn.Module, _args: Any, output: Any) -> None:
        block.free()
        for value in pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(lambda _gradient: self.begin_backward(block))

    def close(self) -> None:
        """Take the hooks away; parameters stay the parts they are, without gradients. Local."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.blocks.clear()


class _Block:
    """The parameters that are gathered together.

    A gathered parameter always lies in the same storage, which has no memory in between: what autograd has saved for
    backward finds its values there again.
    """

    def __init__(self, parameters: list[nn.Parameter], channel: Channel) -> None:
        self.parameters = parameters
        self.channel = channel
        self.awaited = False  # whether backward has begun with it and not ended
        self._gathered = False
        self._stand_ins = [stand_in(p, p.device) for p in parameters]
        self._lengths = [-(-p.numel() // channel.size) for p in parameters]
        self._homes = [_without_memory(n * channel.size, p) for n, p in zip(self._lengths, parameters, strict=True)]
        self._gradients: list[torch.Tensor | None] = [None] * len(parameters)
        self._parts: list[torch.Tensor] = [p.data for p in parameters]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, parameter in enumerate(parameters):
            by_dtype.setdefault(parameter.dtype, []).append(i)
        # For each dtype its members, and their parts one after the other, ready to be sent.
        self._runs = [(members, self._lay_out(members)) for members in by_dtype.values()]

    def _lay_out(self, members: list[int]) -> torch.Tensor:
        run = self.parameters[members[0]].new_empty(sum(self._lengths[i] for i in members))
        for i, place in zip(members, run.split([self._lengths[i] for i in members]), strict=True):
            place.copy_(shard_of(self._parts[i], self.channel.rank, self.channel.size))
            self._parts[i] = self.parameters[i].data = place
        return run

    def hide(self) -> None:
        for i, parameter in enumerate(self.parameters):
            self._gradients[i], parameter.grad = parameter.grad, None
            parameter.data = self._stand_ins[i]

    def show(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.grad = None
            parameter.data = self._parts[i]
            parameter.grad = self._gradients[i]

    @torch.no_grad()
    def gather(self) -> None:
        if self._gathered:
            return
        self._gathered = True
        for members, run in self._runs:
            lengths = [self._lengths[i] for i in members]
            rows = [row.split(lengths) for row in self.channel.all_gather(run)]
            for i, *pieces in zip(members, *rows, strict=True):
                home, layout = self._homes[i], self._stand_ins[i]
                home.untyped_storage().resize_(home.numel() * home.itemsize)
                torch.cat(pieces, out=home)
                self.parameters[i].data = home[: layout.numel()].view(layout.shape)

    def free(self) -> None:
        self._gathered = False
        for home, parameter, layout in zip(self._homes, self.parameters, self._stand_ins, strict=True):
            home.untyped_storage().resize_(0)
            parameter.data = layout

    @torch.no_grad()
    def reduce(self, silent: bool) -> list[int]:
        """Add the sum over the ranks to the gradients of this rank's parts; returns whose parameters had one, by id."""
        used = []
        for members, run in self._runs:
            trained = [i for i in members if self.parameters[i].requires_grad]
            lengths = [self._lengths[i] for i in trained]
            rows = run.new_zeros((self.channel.size, sum(lengths)))
            for i, place in zip(trained, rows.split(lengths, 1), strict=True):
                parameter = self.parameters[i]
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None and not silent:
                    used.append(id(parameter))
                    padded = gradient.new_zeros(place.numel())
                    padded[: gradient.numel()] = gradient.reshape(-1)
                    place.copy_(padded.view_as(place))
            if not trained:
                continue
            for i, total in zip(trained, self.channel.reduce_scatter(rows.view(-1)).split(lengths), strict=True):
                own = self._gradients[i]
                self._gradients[i] = total.clone() if own is None else own.add_(total)
        return used


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


def _without_memory(numel: int, like: torch.Tensor) -> torch.Tensor:
    home = like.detach().new_empty(numel)
    home.untyped_storage().resize_(0)
    return home


def blocks_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int | None = None
) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Choose the modules whose parameters are gathered together. Local; the model is left as it was.

    They are the largest subtrees with at most `limit` parameter elements, by default one in `BLOCKS` of all. A
    parameter is gathered with the innermost one that computes at all times when it is read: a forward may read what
    belongs to a module without calling it.

    Args:
        model: The module.
        args: An example call's.
        kwargs: The same.
        limit: Elements.
    """
    if limit is None:
        limit = sum(p.numel() for p in model.parameters()) // BLOCKS

    def walk(module: nn.Module) -> list[nn.Module]:
        if sum(p.numel() for p in module.parameters()) <= limit:
            return [module]
        return [module, *(block for child in module.children() for block in walk(child))]

    chosen = set(walk(model))
    with _Reads(model, chosen) as reads, untouched(model), torch.no_grad():
        model(*args, **kwargs)
    members: dict[nn.Module, list[nn.Parameter]] = {module: [] for module in model.modules() if module in chosen}
    for parameter in model.parameters():
        stacks = reads.stacks.get(parameter, [[model]])
        shared = [module for module in stacks[0] if all(module in stack for stack in stacks[1:])]
        members[shared[-1]].append(parameter)
    return [(module, own) for module, own in members.items() if own]


class _Reads(TorchFunctionMode):
    """Notes which of the chosen modules compute whenever a parameter is read."""

    def __init__(self, model: nn.Module, chosen: set[nn.Module]) -> None:
        super().__init__()
        self.stacks: dict[nn.Parameter, list[list[nn.Module]]] = {}
        self._stack: list[nn.Module] = []
        self._own = set(model.parameters())
        self._hooks = [
            hook
            for module in chosen
            for hook in (
                module.register_forward_pre_hook(lambda module, _args: self._stack.append(module)),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            )
        ]

    def _leave(self) -> None:
        self._stack.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)) if self._stack else ():
            if isinstance(value, nn.Parameter) and value in self._own:
                self.stacks.setdefault(value, []).append(list(self._stack))
        return function(*args, **(kwargs or {}))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
