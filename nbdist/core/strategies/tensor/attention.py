"""Tensor-parallel ``nn.MultiheadAttention``: its heads are split over the ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbdist.core.strategies.tensor.autograd_collectives import TensorAxis, copy_in, gather_out, sum_out
from nbdist.core.strategies.tensor.dropout import local_dropout_mask

__all__ = ["attend", "is_splittable"]


def attend(
    layer: Any, axis: TensorAxis, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None, need_weights: bool = True, attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """``layer(query, key, value, ...)`` with this rank's heads. **Collective**.

    Args:
        layer: The ``nn.MultiheadAttention``, whose parameters are this rank's parts.
        axis: The axis over which the heads are split.
        query: (batch, length, width), or as ``batch_first`` says; so are `key` and `value`.
        key: As `query`.
        value: As `query`.
        key_padding_mask: See ``nn.MultiheadAttention``, as for the others.
        need_weights: Whether to return the attention weights of all heads.
        attn_mask: (queries, keys), or with all heads (batch * heads, queries, keys).
        average_attn_weights: Whether those are averaged over the heads.
        is_causal: Whether `attn_mask` is the causal mask.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = query.dim() == 3
    q, k, v = _project(layer, axis, query, key, value)
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not layer.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    heads = layer.num_heads // axis.size
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    p = layer.dropout if layer.training else 0.0
    # As in torch, the hint alone counts then: the mask itself may be on another device.
    hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if hint else _merged(axis, layer.num_heads, q, attn_mask, key_padding_mask)
    weights = None
    if need_weights or p > 0.0:
        if hint:
            mask = q.new_full((q.shape[-2], k.shape[-2]), -math.inf).triu(1)
        weights = _weights(axis, q, k, mask, p, masked_rows=float("nan") if need_weights else 0.0)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=hint)
    # (length, batch, width) in memory, as in torch: a dropout that follows draws in memory order.
    out = sum_out(F.linear(out.permute(2, 0, 1, 3).flatten(-2), layer.out_proj.weight), axis)
    if layer.out_proj.bias is not None:
        out = out + layer.out_proj.bias.to(out.dtype)
    if not batched:
        out = out.squeeze(1)
    elif layer.batch_first:
        out = out.transpose(0, 1)
    if not need_weights or weights is None:
        return out, None
    shown = _of_all_heads(weights, axis, average_attn_weights)
    return out, shown if batched else shown.squeeze(0)


def _project(layer: Any, axis: TensorAxis, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of this rank's heads: (..., width / size) each."""
    query, key, value = inputs
    if query is key is value and layer.in_proj_weight is not None:
        return list(F.linear(copy_in(query, axis), layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1))
    copies = {id(x): copy_in(x, axis) for x in inputs}
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None, None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return [F.linear(copies[id(x)], weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


def _merged(
    axis: TensorAxis, heads: int, q: torch.Tensor, attn_mask: torch.Tensor | None, padding: torch.Tensor | None
) -> torch.Tensor | None:
    """Both masks as one to add to the scores, broadcast to (batch, heads / size, queries, keys)."""
    parts = []
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        parts.append(mask if mask.dim() == 2 else axis.part(mask.unflatten(0, (-1, heads)), 1))
    if padding is not None:
        parts.append(_additive(padding, q.dtype)[:, None, None, :])
    return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _weights(
    axis: TensorAxis, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, p: float, masked_rows: float
) -> torch.Tensor:
    """Attention weights after dropout, drawn as one process draws it: (batch, heads / size, queries, keys)."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), masked_rows)
    return weights * local_dropout_mask(weights, p, axis, 1, torch.dropout) if p else weights


def _of_all_heads(weights: torch.Tensor, axis: TensorAxis, average: bool) -> torch.Tensor:
    """(batch, queries, keys), the mean over all heads, or (batch, heads, queries, keys)."""
    if average:
        return sum_out(weights.sum(1), axis) / (weights.shape[1] * axis.size)
    return gather_out(weights.movedim(1, -1), axis).movedim(-1, 1)


def is_splittable(layer: Any) -> bool:
    """Whether `attend` can replace the forward of `layer`."""
    plain = type(layer) is nn.MultiheadAttention and "forward" not in vars(layer)
    return plain and layer.bias_k is None and layer.bias_v is None and not layer.add_zero_attn
