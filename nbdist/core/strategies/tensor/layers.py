"""Column-, row- and vocabulary-parallel layers: their forwards with this rank's part of the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbdist.core.params.placement import Cut
from nbdist.core.strategies.tensor.autograd_collectives import SharedCopyIn, TensorAxis, copy_in, gather_out, sum_out

__all__ = ["KINDS", "column", "column_gather", "cuts_of", "embedding", "features", "is_conv1d", "row"]

KINDS = {
    "column": "outputs are split, up to the next row layer",
    "row": "inputs are split, outputs are summed",
    "column_gather": "outputs are split, and gathered at once",
    "embedding": "rows of the table are split",
    "attention": "heads are split",
}
"""How a layer can be split."""


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (as in GPT-2), a linear layer whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def features(layer: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None for any other layer, and for one with another forward."""
    if "forward" in vars(layer) or not isinstance(getattr(layer, "weight", None), nn.Parameter):
        return None
    if is_conv1d(layer):
        n_in, n_out = layer.weight.shape
        return int(n_in), int(n_out)
    if type(layer).forward is nn.Linear.forward and "weight" in layer._parameters:
        return layer.in_features, layer.out_features
    return None


def cuts_of(layer: Any, kind: str, sections: tuple[int, ...] | None = None) -> dict[str, Cut]:
    """How the parameters of a layer are cut, by their name in the layer. Local.

    Args:
        layer: A linear layer, an embedding, or an ``nn.MultiheadAttention``, whole.
        kind: One of `KINDS`.
        sections: Sections of a column's outputs; by default one.
    """
    if kind == "attention":
        return _attention_cuts(layer)
    if kind == "embedding":
        return {"weight": Cut(dim=0, sections=(len(layer.weight),))}
    out_dim = 1 if is_conv1d(layer) else 0
    n_in, n_out = layer.weight.shape[1 - out_dim], layer.weight.shape[out_dim]
    if kind == "row":
        return {"weight": Cut(dim=1 - out_dim, sections=(n_in,))}
    cuts = {"weight": Cut(dim=out_dim, sections=sections or (n_out,))}
    if layer.bias is not None:
        cuts["bias"] = Cut(dim=0, sections=sections or (n_out,))
    return cuts


def _attention_cuts(layer: Any) -> dict[str, Cut]:
    width = layer.embed_dim
    rows = {name: Cut(dim=0, sections=(width,)) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
    three = Cut(dim=0, sections=(width, width, width))
    cuts = rows | {"in_proj_weight": three, "in_proj_bias": three, "out_proj.weight": Cut(dim=1, sections=(width,))}
    return {name: cut for name, cut in cuts.items() if name == "out_proj.weight" or getattr(layer, name) is not None}


def column(layer: Any, shared_copy_in: SharedCopyIn, x: torch.Tensor) -> torch.Tensor:
    """This rank's outputs of a linear layer: (..., in) to (..., out / size)."""
    return _product(layer, shared_copy_in(x), layer.bias)


def column_gather(layer: Any, axis: TensorAxis, x: torch.Tensor) -> torch.Tensor:
    """All outputs of a linear layer, each computed by one rank: (..., in) to (..., out). **Collective**."""
    return gather_out(_product(layer, copy_in(x, axis), layer.bias), axis)


def row(layer: Any, shared_copy_in: SharedCopyIn, x: torch.Tensor) -> torch.Tensor:
    """The outputs of a linear layer from inputs that are split: (..., in / size) to (..., out). **Collective**."""
    shared_copy_in.release()
    total = sum_out(_product(layer, x, None), shared_copy_in.axis)
    return total if layer.bias is None else total + layer.bias.to(total.dtype)


def _product(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, layer.weight.t() if is_conv1d(layer) else layer.weight, bias)


def embedding(layer: nn.Embedding, axis: TensorAxis, indices: torch.Tensor) -> torch.Tensor:
    """Look-up in an embedding of which each rank holds some rows: (...) to (..., width). **Collective**."""
    rows = len(layer.weight)
    first = axis.rank * rows
    local = indices - first
    # Rows of other ranks. Indices out of range are kept, so that F.embedding raises as usual.
    elsewhere = ((local < 0) | (local >= rows)) & (indices >= 0) & (indices < rows * axis.size)
    padding = layer.padding_idx
    padding = padding - first if padding is not None and 0 <= padding - first < rows else None
    found = F.embedding(local.masked_fill(elsewhere, 0), layer.weight, padding)
    return sum_out(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), axis)
