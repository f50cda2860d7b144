"""Traces which linear layers feed which others in one forward, by walking autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nbdist.core.data.reader import copy_batch
from nbdist.core.data.sources import tensors_in
from nbdist.core.strategies.tensor.dropout import Draws
from nbdist.core.strategies.tensor.layers import features

__all__ = ["Region", "Trace"]

_MAX_NODES = 500
"""Largest number of autograd nodes between two layers that may be split together."""


@dataclass(kw_only=True)
class Region:
    """The operations between a linear layer's input and the linear layers that it comes from.

    Args:
        columns: Those layers.
        dropouts: Dropout modules, and the dim along which their input is split if the columns are: heads, or the last.
        draws: The same for dropout functions, by their number in the whole forward.
        partial: Parameters used in between.
        mixes: Whether it mixes positions, as attention does.
    """

    columns: list[str] = field(default_factory=list)
    dropouts: dict[str, int] = field(default_factory=dict)
    draws: dict[int, int] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    mixes: bool = False


class Trace:
    """One traced forward of a whole module, in its present mode. Local; the module is left unchanged.

    Args:
        model: The module.
        args: Arguments of the example call.
        kwargs: Its keyword arguments.

    Attributes:
        called: Layers that hold parameters, in the order of their first call.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called: list[str] = []
        self._modules = dict(model.named_modules())
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._inputs: dict[str, torch.Tensor] = {}
        self._producers: dict[Any, str] = {}
        self._dropout_calls: dict[Any, tuple[int, int]] = {}
        self._draws_before: dict[str, int] = {}
        frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        handles = [module.register_forward_pre_hook(self._record_start(name)) for name, module in self._modules.items()]
        handles += [
            module.register_forward_hook(self._record_call(name), with_kwargs=True)
            for name, module in self._modules.items()
            if any(p is not None for p in module._parameters.values()) or isinstance(module, nn.Dropout)
        ]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.enable_grad(), Draws(self._draw):
                args, kwargs = copy_batch((args, kwargs))
                self._output = model(*args, **kwargs)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for handle in handles:
                handle.remove()

    def linears(self) -> Iterator[str]:
        """Linear layers, in the order of their first call."""
        return (name for name in self.called if features(self._modules[name]) is not None)

    def region(self, layer: str) -> Region | None:
        """Walk back from the input of a linear layer; None if it does not come from linear layers only."""
        region = Region()
        stack, seen = [self._inputs[layer].grad_fn], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            source = self._producers.get(node)
            if len(seen) > _MAX_NODES or not (source is None or self._passes(source, region)):
                return None
            if source in region.columns:
                continue
            if node in self._dropout_calls and not (source and isinstance(self._modules[source], nn.Dropout)):
                number, dim = self._dropout_calls[node]
                region.draws[number] = dim
            if (used := self._parameters.get(id(getattr(node, "variable", None)))) is not None:
                region.partial.add(used)
            region.mixes |= any(word in node.name() for word in ("Bmm", "Softmax", "Attention"))
            stack.extend(following for following, _ in node.next_functions)
        return region if region.columns else None

    def _passes(self, source: str, region: Region) -> bool:
        """Add a module to a region; False if a split region cannot contain it."""
        module = self._modules[source]
        if features(module) is not None:
            region.columns.append(source)
        elif isinstance(module, nn.Dropout):
            region.dropouts[source] = _split_dim(self._inputs[source])
        else:  # a norm over each head, whose weights are whole on every rank
            return "Norm" in type(module).__name__ and self._inputs[source].dim() >= 4
        return True

    def number_in(self, block: str, draw: int) -> int:
        """The number of a dropout call in the forward of a block, from its number in the whole forward."""
        return draw - self._draws_before[block]

    def _draw(self, func: Any, given: dict[str, Any]) -> torch.Tensor:
        out: torch.Tensor = func(**given)
        number = len(self._dropout_calls)
        # Calls outside the graph are counted too.
        self._dropout_calls[out.grad_fn or number] = number, -3 if "query" in given else _split_dim(given["input"])
        return out

    def _record_start(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._draws_before.setdefault(name, len(self._dropout_calls))

        return hook

    def _record_call(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = next(tensors_in([args, kwargs]), None)
            if given is None:
                return
            if name not in self._inputs:
                self._inputs[name] = given
                self.called.append(name)
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:
                    self._producers.setdefault(tensor.grad_fn, name)

        return hook


def _split_dim(x: torch.Tensor) -> int:
    """Between columns and rows, (batch, heads, ...) is split along heads, any other tensor along its features."""
    return -3 if x.dim() == 4 else -1
