"""What is wrong where one of torch's losses cannot compare an output with a target, in one sentence."""

from __future__ import annotations

from typing import Any

import torch

from nbdist.errors import TaskError

__all__ = ["check_shapes", "mismatch"]


def check_shapes(name: str, output: Any, target: Any) -> None:
    """Check that a loss which compares element by element has as many targets as outputs. Local, 0.3 us.

    Raises:
        TaskError: torch would repeat one of them, so that each output is compared with the targets of other samples.
    """
    if isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor) and output.shape != target.shape:
        try:
            repeated = tuple(torch.broadcast_shapes(output.shape, target.shape))
        except RuntimeError:
            raise _apart(name, output, target, "they do not fit") from None
        raise _apart(name, output, target, f"torch would repeat them to {repeated}")


def _apart(name: str, output: torch.Tensor, target: torch.Tensor, what: str) -> TaskError:
    shapes = f"an output of shape {tuple(output.shape)} with a target of shape {tuple(target.shape)}"
    if target.shape == output.shape[:-1]:
        cure = "give the targets as y.unsqueeze(-1), or let the model end with .squeeze(-1)"
    elif output.shape == target.shape[:-1]:
        cure = "give the targets as y.squeeze(-1)"
    else:
        cure = "give targets of the output's shape"
    return TaskError(f"loss {name} compares {shapes}, and {what}: {cure}.")


def mismatch(name: str, output: Any, target: Any, ignored: int | None) -> TaskError | None:
    """The sentence for an error that a loss of torch's raised. Local.

    Args:
        name: The loss's.
        output: What it was given.
        target: What it was given.
        ignored: The target that is ignored, of a loss over classes; None for other losses.

    Returns:
        None where nothing is known to be wrong.
    """
    if not isinstance(output, torch.Tensor):
        return TaskError(
            f"loss {name} takes a tensor, but the model returns a {type(output).__name__}: write the step, which picks "
            "the part that is compared (a %%dist_train cell, or step=...)."
        )
    if not isinstance(target, torch.Tensor):
        return TaskError(
            f"loss {name} takes a tensor as target, but the last element of a batch is a {type(target).__name__} of "
            f"{type(next(iter(target), None)).__name__ if isinstance(target, (list, tuple)) else 'one value'}: give "
            "numbers, such as class numbers."
        )
    if ignored is None or output.ndim < 1:
        return None
    classes = output.shape[1] if output.ndim > 1 else output.shape[0]
    have = f"targets of shape {tuple(target.shape)} and type {str(target.dtype).removeprefix('torch.')}"
    if target.shape == output.shape and not target.is_floating_point():
        return TaskError(
            f"loss {name} takes class numbers or probabilities, not {have}: give y.argmax(1), or y.float()."
        )
    if (target.shape != output.shape and target.is_floating_point()) or target.dtype not in (torch.int64, torch.uint8):
        return TaskError(f"loss {name} takes class numbers as whole numbers (int64), not {have}: give y.long().")
    if target.ndim == output.ndim and target.shape[1:2] == (1,):
        return TaskError(f"loss {name} takes one class number a sample, not {have}: give y.squeeze(1).")
    counted = target[target != ignored]
    if counted.numel() and not 0 <= counted.min().item() <= counted.max().item() < classes:
        least, most = int(counted.min()), int(counted.max())
        more = f"give its last layer at least {most + 1} outputs"
        cure = more if least >= 0 else f"number the classes from 0 on (targets of {ignored} are ignored)"
        return TaskError(
            f"the targets of a batch hold classes from {least} to {most}, but the model has {classes} outputs, for the "
            f"classes 0 to {classes - 1}: {cure}."
        )
    return None
