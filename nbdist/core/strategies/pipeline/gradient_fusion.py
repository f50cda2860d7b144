"""Gradient accumulation fusion, as in Megatron-LM: a linear layer's backward adds to its weight's gradient in place.

Without it each microbatch computes a weight's gradient into memory of its own, which is then added. For a large weight
and a microbatch of few rows, writing, reading and freeing that memory takes longer than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nbdist.upstream.torch_private import has_saved_tensor_hooks, tensor_hooks

__all__ = ["GradientFusion"]

_LINEAR = {F.linear, torch.ops.aten.linear, torch.ops.aten.linear.default}
_LEAST_BYTES = 2**20
"""Smaller weights stay in the cache, and a function in Python would cost more than it saves."""


class GradientFusion(TorchFunctionMode):
    """Context for forwards, whose linear layers then add to their weights' gradients in `backward`.

    Elsewhere, as in ``torch.autograd.grad``, they have the gradients of any linear layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_accumulating = False

    def backward(self, loss: torch.Tensor) -> None:
        """``loss.backward()``, adding to every ``.grad``. Local."""
        self.is_accumulating = True
        try:
            loss.backward()
        finally:
            self.is_accumulating = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or the fused linear layer in its place."""
        if func in _LINEAR:
            x, weight, bias = _arguments(*args, **(kwargs or {}))
            if _fits(x, weight):
                return _FusedLinear.apply(self, x, weight, bias)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fusion: GradientFusion, x: torch.Tensor, weight: nn.Parameter, bias: Any) -> torch.Tensor:
        ctx.fusion, ctx.weight = fusion, weight
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = gradient @ weight if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        total = ctx.weight.grad
        if total is None or not ctx.fusion.is_accumulating or torch.is_grad_enabled():  # gradients of gradients
            return None, of_x, rows.t() @ inputs, of_bias
        total.addmm_(rows.t(), inputs)
        for hook in (tensor_hooks(ctx.weight)[1] or {}).values():
            hook(ctx.weight)
        return None, of_x, None, of_bias


def _arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _fits(x: Any, weight: Any) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.requires_grad
        and weight.ndim == 2
        and weight.nbytes >= _LEAST_BYTES
        and not tensor_hooks(weight)[0]
        and not has_saved_tensor_hooks()  # a checkpoint must save the same tensors when it computes again, in backward
        and type(x) is torch.Tensor
        and x.dtype == weight.dtype
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
    )
