"""What the check of a run says to the user where it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nbdist.core.check.plain_step import StepResult
from nbdist.plan import Mesh

__all__ = [
    "FIRST_FORWARD",
    "GATHERED",
    "OPTIMIZER",
    "OTHER_DATA",
    "apart",
    "no_mean",
    "off_on_mesh",
    "other_buffers",
    "unlike",
    "wrong_gradient",
]

_SUM = (
    "give reduction='sum' (--reduction sum), or divide it by the number of samples, as in `return loss / len(batch[0])`"
)
_NO_MEAN = (
    "the loss of {samples} samples in one batch is {whole}, but the mean of those of its {slices} slices is "
    "{mean}{ratio}: it is no mean over samples. {cure}; where each slice is meant by itself (as in BatchNorm), "
    "give check='mesh' (--check mesh)."
)
_REASONS = {
    "tp": ("a layer is split that must stay whole", "leave it out of tensor_plan, or use the strategy data or shard"),
    "pp": (
        "the traced forward leaves out what Python does beside its operations",
        "cut elsewhere (split_at), or use the strategy data or shard",
    ),
    "shard": ("the forward or the step uses a parameter outside of its module", "use the strategy data"),
    "dp": ("the step keeps something from slice to slice", "keep it in a buffer, or train on one rank"),
}
OPTIMIZER = (
    "the optimizer computes something from whole tensors, or from all of them",
    "use another one, such as adamw, or the strategy data",
)
FIRST_FORWARD = (
    "the forward, or the optimizer, gives a parameter values of its own in the first step",
    "run one forward before the training, so that all ranks begin with the same values",
)
GATHERED = (
    "the rows of nbdist.gather are not in the samples' order, as where one tensor has two kinds of rows",
    "gather each kind by itself, or one row for each sample",
)
OTHER_DATA = (
    "rank {rank} reads other samples than rank 0: the data draws random numbers that differ from process to process. "
    "Call torch.manual_seed(0) before the data are made; where a data set draws in each sample, from torch's, Python's "
    "or NumPy's own generators, which nbdist seeds, or one with a fixed seed."
)


def no_mean(whole: float, sliced: StepResult, samples: int) -> str:
    """That the loss of a whole batch is not the mean of its slices' losses."""
    is_sum = abs(whole - sum(sliced.losses)) < 1e-3 * abs(whole)
    in_one, mean = unlike(whole, sliced.loss)
    return _NO_MEAN.format(
        samples=samples, whole=in_one, slices=len(sliced.losses), mean=mean,
        ratio=", and their sum is the loss" if is_sum else "",
        cure=f"Of a sum, {_SUM}" if is_sum else "Return with it the number that it is a mean over, as in `return loss, "
        "mask.sum()`; a loss that compares samples, or is a ratio over the batch (Dice), takes the rows of all slices: "
        "nbdist.gather(output), nbdist.gather(y)",
    )  # fmt: skip


def unlike(first: float, second: float) -> tuple[str, str]:
    """Two numbers with as many digits as show that they differ, six at least."""
    texts = [(f"{first:.{digits}g}", f"{second:.{digits}g}") for digits in range(6, 18)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[-1])


def apart(expected: torch.Tensor, got: torch.Tensor) -> str:
    """How far two tensors are apart, as a clause."""
    difference = (expected.double() - got.detach().reshape(expected.shape).double()).abs()
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    return f"is up to {difference.max().item():.3g} off (its largest value is {scale:.3g})"


def wrong_gradient(name: str, samples: int, slices: int) -> str:
    """That the gradient of a whole batch is not the mean of its slices' gradients."""
    return (
        f"the gradient of {name} for {samples} samples in one batch is not the mean of those of its {slices} slices, "
        "though the loss is: the step detaches, or divides by, something that depends on the batch. Return the loss as "
        "a mean over samples, with its weight; if each slice is meant by itself, give check='mesh' (--check mesh)."
    )


def other_buffers(names: Sequence[str]) -> str:
    """That buffers are not those that the whole batch gives."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"buffer {names[0]}{more} is not what the whole batch in one process gives: forward changes it with each "
        "slice, and in the end it is the mean over the ranks, or rank 0's if it is a whole number, also where a sum or "
        "a maximum is meant"
    )


def log_no_mean(name: str, whole: float, sliced: float, samples: int) -> str:
    """That a number that the step logs is not the mean over the slices of a batch."""
    of_batch, mean = unlike(whole, sliced)
    return (
        f"log[{name!r}] is {of_batch} for a batch of {samples} samples, and {mean} as the mean over its slices, which "
        "is shown: log a mean over what the loss is a mean over"
    )


def other_log_on_mesh(name: str, mesh: Mesh, got: float, expected: float) -> str:
    """That a number that the step logs is another one on a mesh."""
    here, plain = unlike(got, expected)
    where = f"on mesh {mesh}, and {plain} in one process"
    return f"log[{name!r}] is {here} {where}: the step makes it of more than its slice"


def evaluate_no_mean(function: str, name: str, whole: float, halves: float, samples: int) -> str:
    """That a number that an evaluation returns is no mean over samples."""
    in_one, mean = unlike(whole, halves)
    return (
        f"{function} returns {name}={in_one} for {samples} samples, and {mean} as the mean over their halves, so "
        "batches and slices could not be averaged: return (mean, weight), with the number that the mean is over, or an "
        "object with update and compute."
    )


def off_on_mesh(mesh: Mesh, what: str, how: str, samples: int, reason: tuple[str, str] | None = None) -> str:
    """That a mesh gives another result than one process; `reason` is why, probably, and the cure."""
    axes = ("tp", "pp", "shard", "dp")
    why, cure = reason or next(_REASONS[axis] for axis in axes if getattr(mesh, axis) > 1 or axis == "dp")
    return (
        f"on mesh {mesh} {what} {how}, as one process has it for the same {samples} samples: probably {why}. "
        f"{cure[0].upper()}{cure[1:]}, or report it."
    )
