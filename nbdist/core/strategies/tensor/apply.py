"""Applies a tensor-parallel plan to a module in place, and undoes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.param_table import replace_data
from nbdist.core.params.placement import Cut
from nbdist.core.strategies.tensor import layers
from nbdist.core.strategies.tensor.attention import attend
from nbdist.core.strategies.tensor.autograd_collectives import SharedCopyIn, TensorAxis
from nbdist.core.strategies.tensor.dropout import dropout, with_local_dropout
from nbdist.core.strategies.tensor.plan import Group, TensorPlan, cuts

__all__ = ["Parallelized", "parallelize"]


class Parallelized:
    """A module whose split layers compute together with the other ranks of the axis. See `parallelize`.

    Attributes:
        cuts: How each parameter is cut, by its first name in ``model.named_parameters()``.
        partial: Parameters that are whole on every rank and used inside a split region. A hook sums their gradients
            over the axis in backward: the caller has nothing to do.
        reasons: Why layers stay whole, or are split by themselves only.
        axis: The ``tp`` axis of its collectives.
    """

    def __init__(self, model: nn.Module, channel: Channel, plan: TensorPlan, *, cut: bool = True) -> None:
        self.model = model
        self.reasons = dict(plan.reasons)
        self.cuts: dict[str, Cut] = cuts(model, plan.groups)
        self.partial = {name for group in plan.groups for name in group.partial}
        self.axis = TensorAxis(channel)
        self._undo: list[Callable[[], Any]] = [self.axis.close]
        draws: dict[str, dict[int, int]] = {}
        for group in plan.groups:
            self._split(group)
            if group.draws:
                draws[group.block] = draws.get(group.block, {}) | group.draws
        for name, dims in draws.items():
            block = model.get_submodule(name)
            self._set(block, "forward", functools.partial(with_local_dropout, block, self.axis, dims))
        for name in self.partial:
            self._undo.append(model.get_parameter(name).register_hook(self._sum_gradient).remove)
        self._disable_fast_path()
        if cut:
            for name, how in self.cuts.items():
                parameter = model.get_parameter(name)
                replace_data(parameter, how.part(parameter.data, channel.rank, channel.size))

    def gather(self, name: str) -> torch.Tensor:
        """A copy of a whole parameter. **Collective** over the axis."""
        data = self.model.get_parameter(name).detach()
        cut = self.cuts.get(name)
        return data.clone() if cut is None else cut.join(self.axis.channel.all_gather(data.contiguous()))

    def restore(self) -> None:
        """Give the module its own forwards and attributes back; the caller restores parameters' data. Local."""
        while self._undo:
            self._undo.pop()()

    def _split(self, group: Group) -> None:
        shared_copy_in = SharedCopyIn(self.axis)
        for name, kind in group.layers.items():
            self._change(self.model.get_submodule(name), kind, shared_copy_in)
        for name, dim in group.dropouts.items():
            layer = self.model.get_submodule(name)
            self._set(layer, "forward", functools.partial(dropout, layer, self.axis, dim))
        for path in group.divided:
            inner, _, attribute = path.rpartition(".")
            module = self.model.get_submodule(inner)
            self._set(module, attribute, getattr(module, attribute) // self.axis.size)

    def _change(self, layer: Any, kind: str, shared_copy_in: SharedCopyIn) -> None:
        forward = _FORWARDS[kind]
        shared = shared_copy_in if kind in ("column", "row") else self.axis
        self._set(layer, "forward", functools.partial(forward, layer, shared))
        # The user's code may read these widths, which are now those of this rank.
        width = {"column": ("out_features", "nf"), "row": ("in_features", "nx")}.get(kind, ())
        for attribute in width:
            if attribute in vars(layer):
                self._set(layer, attribute, getattr(layer, attribute) // self.axis.size)

    def _disable_fast_path(self) -> None:
        """Switch off the fast path of torch's transformer layers, which reads weights without calling their layers."""
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                self._set(module, "activation_relu_or_gelu", 0)
            elif isinstance(module, nn.TransformerEncoder):
                self._set(module, "use_nested_tensor", False)

    def _set(self, module: nn.Module, attribute: str, value: Any) -> None:
        own = vars(module)
        if attribute in own:
            self._undo.append(functools.partial(own.__setitem__, attribute, own[attribute]))
        else:
            self._undo.append(functools.partial(own.pop, attribute, None))
        own[attribute] = value

    def _sum_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        self.axis.channel.all_reduce_(total)
        return total


_FORWARDS: dict[str, Callable[..., Any]] = {
    "attention": attend,
    "column": layers.column,
    "column_gather": layers.column_gather,
    "embedding": layers.embedding,
    "row": layers.row,
}


def parallelize(model: nn.Module, channel: Channel, plan: TensorPlan, *, cut: bool = True) -> Parallelized:
    """Split a module in place; module and parameters stay the same objects. Local.

    Args:
        model: The module, whole, with the same weights on every rank.
        channel: The ``tp`` axis, of the plan's degree.
        plan: From `verify_plan` or `plan_from_rules`; the same on every rank.
        cut: Whether to cut the parameters' data too; otherwise the caller does, by `Parallelized.cuts`.
    """
    assert channel.size == plan.size
    return Parallelized(model, channel, plan, cut=cut)
