"""What is checked of a model before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.errors import TaskError

__all__ = ["check_model"]


def check_model(model: Any, name: str, *, trained: bool = True) -> None:
    """Check that a value is a model whose weights can be trained. Local.

    Args:
        model: What the user gave.
        name: The user's name for it.
        trained: Whether it is to be trained; else it may be frozen.

    Raises:
        TaskError: It is not.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TaskError(f"{name} is a class, not a model: write {model.__name__}().")
    if not isinstance(model, nn.Module):
        raise TaskError(f"{name} is a value of type {type(model).__name__}, not a torch.nn.Module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TaskError(f"{name} is wrapped in {type(model).__name__}: pass the module inside, {name}.module.")
    parameters = list(model.named_parameters())
    every = [*parameters, *model.named_buffers()]
    lazy = [n for n, t in every if isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer))]
    if lazy:
        raise TaskError(f"{lazy[0]} of {name} has no shape yet: run one batch through {name} first.")
    for path, tensor in every:
        if tensor.layout is not torch.strided:
            raise TaskError(
                f"{path} of {name} is a sparse tensor, and ranks share parameters and buffers as dense ones: register "
                "it dense, and call to_sparse() in forward; a constant may be a plain attribute."
            )
        if tensor.is_meta:
            how = f"allocate them with {name}.to_empty(device='cpu'), and set or load them."
            raise TaskError(f"{path} of {name} is on the meta device, without values: {how}")
    if trained and not any(p.requires_grad for _, p in parameters):
        raise TaskError(f"{name} has no parameters to train" + (": all are frozen." if parameters else "."))
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TaskError(
                f"{path or name} is a module of TorchScript, whose weights no strategy can take over: train the module "
                "that it was made from, and script or trace it afterwards."
            )
