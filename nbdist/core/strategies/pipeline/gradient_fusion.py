"""Gradient accumulation fusion, as in Megatron-LM: a linear layer's backward adds to its weight's gradient in place.

Without it each microbatch computes a weight's gradient into memory of its own, which is then added. For a large weight
and a microbatch of few rows, writing, reading and freeing that memory takes longer than the arithmetic.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from nbdist.upstream.torch_private import graph_task, has_module_hooks, tensor_hooks

__all__ = ["GradientFusion"]

_LINEAR = (F.linear, torch.ops.aten.linear.default)
_LEAST_BYTES = 2**20
"""Smaller weights stay in the cache, and a function in Python would cost more than it saves."""


class GradientFusion:
    """Fuses the linear layers of pipeline stages.

    Only nodes of a stage's own graph are fused, not what a child does that is called as a whole: it may compute its
    forward again, differentiate it, or map over it. And only in the `backward` here: to ``torch.autograd.grad``, also
    within that backward, a fused layer returns its gradients.
    """

    def __init__(self) -> None:
        self._fused: dict[fx.GraphModule, nn.Module] = {}
        self._task: int | None = None

    def fused(self, stage: fx.GraphModule) -> nn.Module:
        """A stage with fused layers; the stage itself if it has none. Local; cached."""
        if stage not in self._fused:
            self._fused[stage] = self._fuse(stage)
        return self._fused[stage]

    def _fuse(self, stage: fx.GraphModule) -> nn.Module:
        graph, parts = copy.deepcopy(stage.graph), dict[str, Any]()
        count = 0
        for node in graph.nodes:
            part = operator.attrgetter(node.target)(stage) if node.op in ("call_module", "get_attr") else None
            layer: nn.Module | None = None
            if node.op == "call_module" and type(part) is nn.Linear and part.weight.nbytes >= _LEAST_BYTES:
                layer = _FusedLayer(self, part)
            elif node.op == "call_function" and node.target in _LINEAR and _has_large_weight(stage, node):
                layer, node.op = _FusedCall(self), "call_module"
            if layer is not None:
                part, node.target, count = layer, f"fused_{count}", count + 1
            if part is not None:
                parts[node.target] = part
        if not count:
            return stage
        fused = fx.GraphModule(parts, graph, class_name=type(stage).__name__)
        fused.training = stage.training  # not `train()`, which would set the user's modules too
        return fused

    def backward(self, loss: torch.Tensor) -> None:
        """``loss.backward()``, adding to every ``.grad``. Local."""
        hook = loss.register_hook(self._note_task)
        try:
            loss.backward()
        finally:
            hook.remove()
            self._task = None

    def _note_task(self, _gradient: torch.Tensor) -> None:
        self._task = graph_task()

    @property
    def is_accumulating(self) -> bool:
        """Whether autograd runs `backward` now, and not another one within it."""
        return self._task is not None and self._task == graph_task()

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        """`F.linear`, fused where that gives the same gradients."""
        fits = (
            torch.is_grad_enabled()
            and type(weight) is nn.Parameter
            and weight.requires_grad
            and weight.nbytes >= _LEAST_BYTES
            and weight.ndim == 2
            and weight.is_floating_point()
            and (bias is None or bias.ndim == 1)
            and type(x) is torch.Tensor
            and x.dtype == weight.dtype
            and not tensor_hooks(weight)[0]
            and not torch.is_autocast_enabled(x.device.type)
        )
        if fits:
            return _FusedLinear.apply(self, x, weight, bias)  # type: ignore[no-untyped-call]
        return F.linear(x, weight, bias)


def _has_large_weight(stage: fx.GraphModule, call: fx.Node) -> bool:
    weight = call.kwargs.get("weight", call.args[1] if len(call.args) > 1 else None)
    return (
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and bool(operator.attrgetter(str(weight.target))(stage).nbytes >= _LEAST_BYTES)
    )


class _FusedLayer(nn.Module):
    """Calls a linear layer of the user's."""

    def __init__(self, fusion: GradientFusion, layer: nn.Linear) -> None:
        super().__init__()
        self.fusion, self.layer = fusion, layer

    def forward(self, x: Any) -> Any:
        """The layer's output."""
        if has_module_hooks(self.layer) or "forward" in vars(self.layer):
            return self.layer(x)
        return self.fusion.linear(x, self.layer.weight, self.layer.bias)


class _FusedCall(nn.Module):
    """Is called in place of the function."""

    def __init__(self, fusion: GradientFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, input: Any, weight: Any, bias: Any = None) -> Any:
        """The function's result; its arguments have torch's names."""
        return self.fusion.linear(input, weight, bias)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fusion: GradientFusion, x: torch.Tensor, weight: nn.Parameter, bias: Any) -> torch.Tensor:
        ctx.fusion, ctx.weight = fusion, weight
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[1] else None)
        output = F.linear(x, weight, bias)
        # Autograd forbids to write to a view that a function returns, as the next layer may do in place.
        return output if x.ndim == 2 else torch.ops.aten._unsafe_view(output, output.shape)

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
        # A reducer learns from these hooks that a parameter was used. Not every torch calls them without a gradient.
        for hook in (tensor_hooks(ctx.weight)[1] or {}).values():
            hook(ctx.weight)
        return None, of_x, None, of_bias
