"""Changes of weights in their last bits, which show what rounding alone does to a result."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["nudge_"]


@torch.no_grad()
def nudge_(parameters: Iterable[torch.Tensor], least: float = 0.0) -> None:
    """Change half of all weights by as much as numbers are rounded: in their last bit. Local.

    Args:
        parameters: The weights.
        least: The relative change, if what computes with them rounds more coarsely than they do.
    """
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.numel():
            half = parameter.detach()[..., ::2] if parameter.ndim else parameter.detach()
            half.mul_(1 + max(least, torch.finfo(parameter.dtype).eps))
