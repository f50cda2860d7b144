"""Tensor-parallel dropout: every rank draws the mask of the whole activation, as one process does, and uses its part.

Modules get another forward. Calls of `F.dropout`, or of torch's attention with dropout, in the user's code are
intercepted by a TorchFunctionMode around the block's forward, and identified by their number among its dropout calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nbdist.core.strategies.tensor.autograd_collectives import TensorAxis

__all__ = ["Draws", "dropout", "local_dropout_mask", "with_local_dropout"]


def local_dropout_mask(
    x: torch.Tensor, p: float, axis: TensorAxis, dim: int, draw: Callable[..., torch.Tensor] = F.dropout
) -> torch.Tensor:
    """This rank's part of the dropout mask for `x`, which is split along `dim`; drawn for the whole. Local.

    `draw` is `F.dropout`, which an active `Draws` counts, or `torch.dropout`, which it does not.
    """
    shape = list(x.shape)
    shape[dim] *= axis.size
    # Random numbers are drawn in memory order: lay the whole out like this part.
    dims = sorted(range(x.dim()), key=x.stride, reverse=True)
    ones = x.new_ones([shape[d] for d in dims]).permute([dims.index(d) for d in range(x.dim())])
    return axis.part(draw(ones, p, True), dim)


def dropout(layer: Any, axis: TensorAxis, dim: int, x: torch.Tensor) -> torch.Tensor:
    """The forward of an ``nn.Dropout`` whose input is split along `dim`."""
    if not layer.training or layer.p == 0.0:
        return x
    mask = local_dropout_mask(x, layer.p, axis, dim)
    return x.mul_(mask) if layer.inplace else x * mask


class Draws(TorchFunctionMode):
    """While active, intercepts every dropout function and calls `draw` instead."""

    def __init__(self, draw: Callable[[Callable[..., torch.Tensor], dict[str, Any]], torch.Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = _DRAWING.get(func)
        if names is None:
            return func(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        draws = given.get("dropout_p", 0.0) if "query" in given else given.get("training", True) and given.get("p", 0.5)
        return self._draw(func, given) if draws else func(*args, **kwargs)


_DRAWING = {
    F.dropout: ("input", "p", "training", "inplace"),
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
}


def with_local_dropout(block: Any, axis: TensorAxis, dims: Mapping[int, int], *args: Any, **kwargs: Any) -> Any:
    """The forward of a block with dropout functions on split activations.

    Args:
        block: The module, with its class's forward.
        axis: The axis over which they are split.
        dims: Number of the dropout call in the block's forward, from 0, to the dim that is split.
        args: Arguments of the forward.
        kwargs: Its keyword arguments.
    """
    forward = type(block).forward
    if not block.training:
        return forward(block, *args, **kwargs)
    numbers: Iterator[int] = iter(range(1_000_000))

    def draw(func: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        dim = dims.get(next(numbers))
        if dim is None:
            return func(**given)
        if "query" in given:
            return _attention(axis, dim, **given)
        x: torch.Tensor = given["input"]
        return x * local_dropout_mask(x, given.get("p", 0.5), axis, dim)

    with Draws(draw):
        return forward(block, *args, **kwargs)


def _attention(
    axis: TensorAxis, dim: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` written out."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores + attn_mask if attn_mask.is_floating_point() else scores.masked_fill(~attn_mask, -math.inf)
    weights = scores.softmax(-1)
    if attn_mask is not None:  # a fully masked query attends to nothing
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return (weights * local_dropout_mask(weights, dropout_p, axis, dim)) @ value
