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
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nbdist.core.channels import Channel
from nbdist.core.placeholder import Placeholders, reveal, stand_in
from nbdist.core.placement import shard_of
from nbdist.core.splitting.untouched import untouched
from nbdist.errors import PlanError

__all__ = ["BLOCKS", "Shards", "blocks_of"]

BLOCKS = 8
"""A block holds at most this fraction of all parameters, where the model's tree allows it."""
_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Shards:
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
        self._homes: dict[int, tuple[_Block, int]] = {}
        placeholders = Placeholders(self._read)
        self.blocks = [_Block(parameters, channel, names, placeholders, self._homes) for parameters in blocks]
        self.silent = False
        self.used: set[int] = set()
        self._hooks: list[Any] = []
        self._lent: list[_Block] = []  # gathered because somebody read them, and not for their module

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
        for block in self.blocks:
            block.show(summed)

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """While forward and backward compute: autograd saves of what is gathered only where to find it again. Local."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

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

    def _before(self, block: _Block, _module: nn.Module, args: Any, kwargs: Any) -> Any:
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

    def _after(self, block: _Block, _module: nn.Module, _args: Any, output: Any) -> None:
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
            raise _written(block.name(parameters[0]), " (it takes its data, where detach() lets one read)")
        wanted = [block for block in self.blocks if any(p in block.places for p in parameters)]
        self._take_back(wanted)
        for block in wanted:
            block.gather()
            block.read |= torch.is_grad_enabled()
            self._lent.append(block)

    def _take_back(self, wanted: Collection[_Block]) -> None:
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
        return tensor if tensor.grad_fn is None else tensor.detach(), tensor._version

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
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.blocks.clear()
        self._lent.clear()
        self._homes.clear()


class _Whereabouts(NamedTuple):
    """What autograd keeps of a tensor that lies in a gathered parameter."""

    found: tuple[_Block, int]
    dtype: torch.dtype
    offset: Any
    size: Any
    stride: Any


class _Block:
    """The parameters that are gathered together.

    Attributes:
        places: The place of each parameter.
        awaited: Whether backward has begun with it and not ended.
        read: Whether gradients may come that its module does not see: others have read it, or nothing that the module
            takes or gives has a gradient.
        gathered: Whether its parameters are whole now.
    """

    def __init__(
        self, parameters: list[nn.Parameter], channel: Channel, names: dict[nn.Parameter, str],
        placeholders: Placeholders, homes: dict[int, tuple[_Block, int]],
    ) -> None:  # fmt: skip
        self.parameters = parameters
        self.places = {parameter: i for i, parameter in enumerate(parameters)}
        self.channel = channel
        self.awaited = self.read = self.gathered = False
        self._names = [names[parameter] for parameter in parameters]
        self._placeholders = placeholders
        self._registered = homes
        self._stand_ins = [stand_in(p, p.device) for p in parameters]
        self._lengths = [-(-p.numel() // channel.size) for p in parameters]
        self._homes: list[torch.Tensor] = []
        self._versions: list[int] = []
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
            self._placeholders.hide(parameter)

    def show(self, summed: bool) -> None:
        self._forget()
        self.awaited = self.read = False
        for i, parameter in enumerate(self.parameters):
            reveal(parameter)
            if summed and parameter.grad is not None:
                raise PlanError(
                    f"the gradient of parameter {self._names[i]} came when that of its layer was summed over the ranks "
                    "already, as a mesh with shard does: use the strategy data."
                )
            parameter.grad = None
            parameter.data = self._parts[i]
            parameter.grad = self._gradients[i]

    @torch.no_grad()
    def gather(self) -> None:
        if self.gathered:
            return
        homes: dict[int, torch.Tensor] = {}
        for members, run in self._runs:
            lengths = [self._lengths[i] for i in members]
            rows = [row.split(lengths) for row in self.channel.all_gather(run)]
            for i, *pieces in zip(members, *rows, strict=True):
                homes[i] = torch.cat(pieces)
        self._homes = [homes[i] for i in range(len(homes))]
        self.gathered = True
        for i, (parameter, home, layout) in enumerate(zip(self.parameters, self._homes, self._stand_ins, strict=True)):
            reveal(parameter)
            parameter.data = home[: layout.numel()].view(layout.shape)
            if address := home.data_ptr():
                self._registered[address] = self, i
        self._versions = [parameter._version for parameter in self.parameters]

    def name(self, parameter: nn.Parameter) -> str:
        return self._names[self.places[parameter]]

    def storage(self, place: int) -> torch.UntypedStorage:
        return self._homes[place].untyped_storage()

    def free(self) -> None:
        """Let go of what was gathered.

        Raises:
            PlanError: Somebody has written to it.
        """
        if not self.gathered:
            return
        homes = self._homes
        self._forget()
        for i, parameter in enumerate(self.parameters):
            if parameter._version != self._versions[i] or parameter.data_ptr() != homes[i].data_ptr():
                raise _written(self._names[i])
            parameter.data = self._stand_ins[i]
            self._placeholders.hide(parameter)

    def _forget(self) -> None:
        self.gathered = False
        for home in self._homes:
            self._registered.pop(home.data_ptr(), None)
        self._homes = []

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


def _written(name: str, how: str = "") -> PlanError:
    return PlanError(
        f"the model's forward, or the step, writes to parameter {name}{how}, of which each rank keeps a part on a mesh "
        "with shard: let the optimizer change it, or use the strategy data."
    )


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

    Raises:
        PlanError: It writes to a parameter past autograd, which would not be seen later.
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
    for name, parameter in model.named_parameters():
        before = reads.data.get(parameter)
        if before is not None and not torch.equal(before.nan_to_num(), parameter.detach().nan_to_num()):
            raise _written(name)
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
        self.data: dict[nn.Parameter, torch.Tensor] = {}  # of those whose `data` were taken, the values before
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
                if function == _DATA and value not in self.data:
                    self.data[value] = value.detach().clone()
        return function(*args, **(kwargs or {}))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
