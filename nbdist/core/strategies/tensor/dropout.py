"""Dropout of what is split: every rank draws for all of it, as one process does, and uses its part.

Modules get another forward. A function that is called in the user's code (`F.dropout`, or the attention of torch with a
dropout) is met by a mode around the forward of the block, and known by its place among the block's draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from nbdist.core.strategies.tensor.autograd_collectives import TensorAxis

__all__ = ["Draws", "dropout", "own_noise", "with_own_draws"]


def own_noise(
    x: torch.Tensor, p: float, axis: TensorAxis, dim: int, draw: Callable[..., torch.Tensor] = F.dropout
) -> torch.Tensor:
    """What dropout multiplies `x` with, whose whole is split along `dim`; numbers are drawn for the whole. Local.

    `draw` is a dropout that `Draws` counts, where it counts what this stands for, or else `torch.dropout`.
    """
    shape = list(x.shape)
    shape[dim] *= axis.size
    # Random numbers are drawn in the order of memory: a whole that is laid out as this part is.
    dims = sorted(range(x.dim()), key=x.stride, reverse=True)
    ones = x.new_ones([shape[d] for d in dims]).permute([dims.index(d) for d in range(x.dim())])
    return axis.part(draw(ones, p, True), dim)


def dropout(layer: Any, axis: TensorAxis, dim: int, x: torch.Tensor) -> torch.Tensor:
    """The forward of an ``nn.Dropout`` whose input is split along `dim`."""
    if not layer.training or layer.p == 0.0:
        return x
    noise = own_noise(x, layer.p, axis, dim)
    return x.mul_(noise) if layer.inplace else x * noise


class Draws(TorchFunctionMode):
    """Meets every function that draws for dropout while it is active, and lets `draw` compute it."""

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


def with_own_draws(block: Any, axis: TensorAxis, dims: Mapping[int, int], *args: Any, **kwargs: Any) -> Any:
    """The forward of a block some of whose draws are for activations that are split.

    Args:
        block: The module, with its class's forward.
        axis: Where they are split.
        dims: Number of the draw in the block's forward, from 0, to the dim that is split.
        args: Of the forward.
        kwargs: Of the forward.
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
        return x * own_noise(x, given.get("p", 0.5), axis, dim)

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
    if attn_mask is not None:  # who sees nothing takes nothing
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    return (weights * own_noise(weights, dropout_p, axis, dim)) @ value
