"""Buffers that a forward makes, resizes or removes: they are taken over like those that were there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nbdist.upstream.torch_private import is_persistent, replace_buffer

__all__ = ["adopt_buffers", "persistence"]


def persistence(model: nn.Module) -> dict[str, bool]:
    """The model's present buffers by name, and whether they are part of its ``state_dict``. Local."""
    found = {}
    for path, module in model.named_modules():
        for key, _ in module.named_buffers(recurse=False):
            found[f"{path}.{key}" if path else key] = is_persistent(module, key)
    return {name: found[name] for name, _ in model.named_buffers()}


def adopt_buffers(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], persistent: Mapping[str, bool], *, all_named: bool = True
) -> None:  # fmt: skip
    """Give a model the buffers that another process's copy of it has; those that are alike stay. Local.

    Args:
        model: The model, whose buffers may be fewer, more, or of another shape.
        tensors: Of the copy, by name.
        persistent: Its buffers, see `persistence`.
        all_named: Whether the copy has no others, so that others are removed.
    """
    own = dict(model.named_buffers())
    device = next((tensor.device for tensor in (*model.parameters(), *own.values())), torch.device("cpu"))
    for name in persistent:
        tensor, before = tensors[name], own.get(name)
        if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
            _set(model, name, tensor.to(before.device if before is not None else device, copy=True), persistent[name])
    for name in own.keys() - persistent.keys() if all_named else ():
        _set(model, name, None, True)


def _set(model: nn.Module, name: str, value: torch.Tensor | None, persistent: bool) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if not replace_buffer(module, key, value):
        module.register_buffer(key, value, persistent=persistent)
