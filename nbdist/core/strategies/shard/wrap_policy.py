"""Auto-wrap policy for sharding: which parameters are all-gathered together, found by an example call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nbdist.core.params.preserve_model import preserve_model
from nbdist.core.strategies.shard.whole_blocks import written_error
from nbdist.upstream.torch_private import pytree

__all__ = ["BLOCKS", "blocks_of"]

BLOCKS = 8
"""A block holds at most one in `BLOCKS` of all parameter elements, if the module tree allows it."""
_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def blocks_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int | None = None
) -> list[tuple[str, list[str]]]:
    """Choose the modules whose parameters are gathered together. Local; the model is left unchanged.

    They are the largest subtrees with at most `limit` parameter elements, by default one in `BLOCKS` of all. A
    parameter is gathered with the innermost chosen module whose forward encloses all its reads: a forward may read
    parameters of a module that it does not call.

    Args:
        model: The module.
        args: Arguments of an example call.
        kwargs: Its keyword arguments.
        limit: Elements.

    Returns:
        The name of each module, with the names of its parameters.

    Raises:
        PlanError: The forward writes to a parameter's ``data``.
    """
    if limit is None:
        limit = sum(p.numel() for p in model.parameters()) // BLOCKS

    def walk(module: nn.Module) -> list[nn.Module]:
        if sum(p.numel() for p in module.parameters()) <= limit:
            return [module]
        return [module, *(block for child in module.children() for block in walk(child))]

    chosen = set(walk(model))
    with _Reads(model, chosen) as reads, preserve_model(model):
        model(*args, **kwargs)  # with gradients: forward may call autograd itself
    for name, parameter in model.named_parameters():
        before = reads.data.get(parameter)
        if before is not None and not torch.equal(before.nan_to_num(), parameter.detach().nan_to_num()):
            raise written_error(name)
    members: dict[nn.Module, list[str]] = {module: [] for module in model.modules() if module in chosen}
    for name, parameter in model.named_parameters():
        stacks = reads.stacks.get(parameter, [[model]])
        shared = [module for module in stacks[0] if all(module in stack for stack in stacks[1:])]
        members[shared[-1]].append(name)
    modules = {module: name for name, module in model.named_modules()}
    return [(modules[module], own) for module, own in members.items() if own]


class _Reads(TorchFunctionMode):
    """Records which of the chosen modules are in forward at each read of a parameter."""

    def __init__(self, model: nn.Module, chosen: set[nn.Module]) -> None:
        super().__init__()
        self.stacks: dict[nn.Parameter, list[list[nn.Module]]] = {}
        self.data: dict[nn.Parameter, torch.Tensor] = {}  # parameters whose `data` was taken, with the values before
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
