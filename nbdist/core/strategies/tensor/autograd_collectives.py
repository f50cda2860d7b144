"""Differentiable tensor-parallel collectives, where activations enter and leave split layers.

```
               forward      backward
copy_in        identity     all-reduce     into columns
sum_out        all-reduce   identity       out of rows
gather_out     all-gather   own part       out of columns without a row
```

Activations outside are the same on every rank of the axis, and so are their gradients. Each backward can be
differentiated again, as a gradient penalty needs: `copy_in` and `sum_out` are the backward of one another. In eager
mode these are autograd functions. A tracer (`torch.export`, `torch.fx`, fake tensors) records custom ops instead, which
name the axis by its number and do the same when the graph runs.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from nbdist.core.comm import Channel
from nbdist.core.params.func_transforms import check_no_transform

__all__ = ["SharedCopyIn", "TensorAxis", "copy_in", "gather_out", "sum_out"]

_axis_numbers = itertools.count()
_open_axes: dict[int, Channel] = {}


class TensorAxis:
    """The channel along which tensors are split. Local.

    Args:
        channel: The ``tp`` axis. Every rank of it makes the same calls in the same order.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.rank, self.size = channel.rank, channel.size
        self.number = next(_axis_numbers)
        self.use(channel)

    def use(self, channel: Channel) -> None:
        """Communicate through another channel. Local."""
        self.channel = _open_axes[self.number] = channel

    def close(self) -> None:
        """Unregister the axis; graphs that were traced with it raise from now on. Local."""
        _open_axes.pop(self.number, None)

    def part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's even part of `tensor` along `dim`, a view. Local."""
        length = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * length, length)


def copy_in(x: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
    """The identity; its gradient is summed over the ranks. **Collective** in backward.

    The gradient is summed in place, so the operation that uses the result must not keep it; matrix products do not.
    """
    return _copy_in_op(x, axis.number) if _is_traced(x) else _apply(_CopyIn, x, axis)


def sum_out(x: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
    """The sum of the ranks' `x`, in place if `x` is contiguous: no other code may need it. **Collective**."""
    return _sum_out_op(x, axis.number) if _is_traced(x) else _apply(_SumOut, x.contiguous(), axis)


def gather_out(x: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
    """The ranks' `x` concatenated along the last dim. **Collective**."""
    return _gather_out_op(x, axis.number, axis.size) if _is_traced(x) else _apply(_GatherOut, x, axis)


class SharedCopyIn:
    """`copy_in` for layers that read the same tensor (q, k and v): one copy, so one all-reduce in backward."""

    def __init__(self, axis: TensorAxis) -> None:
        self.axis = axis
        self._source: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._version = -1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`copy_in` of `x`, cached for the latest `x`. Local in forward."""
        if _is_traced(x):
            return copy_in(x, self.axis)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self._source is not x or self._version != x._version:
            self._source, self._copy, self._version = x, copy_in(x, self.axis), x._version
        assert self._copy is not None
        return self._copy

    def release(self) -> None:
        """Release the cached activations. Local."""
        self._source = self._copy = None


def _is_traced(x: Any) -> bool:
    """Whether a tracer is running: `x` is a proxy, a fake tensor, or a tensor under export or compile."""
    return torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)


def _apply(function: Any, x: torch.Tensor, axis: TensorAxis) -> torch.Tensor:
    check_no_transform()
    result: torch.Tensor = function.apply(x, axis.channel)
    return result


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, channel: Channel) -> torch.Tensor:
        ctx.channel = channel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # gradients of gradients: what autograd keeps must not be changed
            return _SumOut.apply(gradient.clone(memory_format=torch.contiguous_format), ctx.channel), None  # type: ignore[no-untyped-call]
        gradient = gradient.contiguous()
        ctx.channel.all_reduce_(gradient)
        return gradient, None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, channel: Channel) -> torch.Tensor:
        ctx.mark_dirty(x)
        ctx.channel = channel
        channel.all_reduce_(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            return _CopyIn.apply(gradient, ctx.channel), None  # type: ignore[no-untyped-call]
        return gradient, None


class _GatherOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, channel: Channel) -> torch.Tensor:
        ctx.channel = channel
        return torch.cat(channel.all_gather(x.contiguous()), -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _OwnPart.apply(gradient, ctx.channel), None  # type: ignore[no-untyped-call]


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, channel: Channel) -> torch.Tensor:
        ctx.channel = channel
        return x.chunk(channel.size, -1)[channel.rank]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _GatherOut.apply(gradient, ctx.channel), None  # type: ignore[no-untyped-call]


def _channel(number: int) -> Channel:
    channel = _open_axes.get(number)
    if channel is None:
        raise RuntimeError(f"this graph was traced while the model was split along axis {number}, which is closed.")
    return channel


@torch.library.custom_op("nbdist::copy_in", mutates_args=(), schema="(Tensor x, int axis) -> Tensor")
def _copy_in_op(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("nbdist::sum_out", mutates_args=(), schema="(Tensor x, int axis) -> Tensor")
def _sum_out_op(x: torch.Tensor, axis: int) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    _channel(axis).all_reduce_(total)
    return total


@torch.library.custom_op("nbdist::gather_out", mutates_args=(), schema="(Tensor x, int axis, int size) -> Tensor")
def _gather_out_op(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return torch.cat(_channel(axis).all_gather(x.contiguous()), -1)


@torch.library.custom_op("nbdist::own_part", mutates_args=(), schema="(Tensor x, int axis, int size) -> Tensor")
def _own_part_op(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return x.chunk(size, -1)[_channel(axis).rank].contiguous()


def _remember_axis(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.axis = inputs[1:]


_copy_in_op.register_fake(lambda x, axis: torch.empty_like(x))
_sum_out_op.register_fake(lambda x, axis: torch.empty_like(x, memory_format=torch.contiguous_format))
_gather_out_op.register_fake(lambda x, axis, size: x.new_empty(*x.shape[:-1], x.shape[-1] * size))
_own_part_op.register_fake(lambda x, axis, size: x.new_empty(*x.shape[:-1], x.shape[-1] // size))
_copy_in_op.register_autograd(lambda ctx, g: (_sum_out_op(g, *ctx.axis), None), setup_context=_remember_axis)
_sum_out_op.register_autograd(
    lambda ctx, g: (_copy_in_op(g, *ctx.axis) if torch.is_grad_enabled() else g, None), setup_context=_remember_axis
)
_gather_out_op.register_autograd(lambda ctx, g: (_own_part_op(g, *ctx.axis), None, None), setup_context=_remember_axis)
