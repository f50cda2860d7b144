"""What a loss is a mean over, read off the graph that autograd has recorded for it.

A model that computes its own loss says nowhere what it averages over: tokens, labels other than -100, samples. The
operation that made the mean kept its divisor for backward: nothing has to be caught, and reading it costs a few
attributes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

__all__ = ["mean_over", "recorded"]

_AS_IT_IS = {
    "AliasBackward0", "CloneBackward0", "NegBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "ToCopyBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
_SUMS = {"AddBackward0", "SubBackward0"}
_SCALES = {"MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1"}
_CLASSES = {"NllLossBackward0", "NllLoss2DBackward0"}
_ELEMENTS = {
    "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0", "HuberLossBackward0", "MseLossBackward0",
    "SmoothL1LossBackward0", "SoftMarginLossBackward0",
}  # fmt: skip
_MEANS = {"MeanBackward0", "MeanBackward1"}
_MEAN, _SUM = 1, 2  # torch's own numbers for `reduction`
_COUNTS_EXACTLY = (torch.float32, torch.float64)


class _Mean(NamedTuple):
    """A term of a loss: the mean's divisor, and of how many elements those that it leaves out are some."""

    over: Any
    elements: int


class _Unknown(Exception):
    """Something that is no mean, or of what cannot be seen."""


def mean_over(loss: torch.Tensor, samples: int) -> Any:
    """The weight with which `loss` averages exactly with those of other slices. Local.

    Args:
        loss: A scalar; its graph is there, with gradients enabled or `recorded`.
        samples: In the slice.

    Returns:
        A number or a scalar tensor; None where the graph does not say. Of several terms, all are means over the same,
        or each over all elements of every sample: then it is `samples`.
    """
    terms: list[_Mean] = []
    sums: list[torch.Tensor | float] = []
    try:
        _walk(loss.grad_fn, terms, sums)
        for divisor in sums:  # by what nobody can say, unless it is the number of samples or that of another term
            value = float(divisor)
            if value == samples:
                terms.append(_Mean(samples, samples))
            elif not any(value == float(term.over) for term in terms):
                return None
    except (_Unknown, AttributeError):  # nodes are named and kept as this torch does it
        return None
    if not terms:
        return None
    if len(terms) == 1:
        return terms[0].over
    numbers = {(float(term.over), term.elements) for term in terms}
    if len(numbers) == 1:
        return terms[0].over
    every = all(over == elements and elements % max(1, samples) == 0 for over, elements in numbers)
    return samples if every else None


def _walk(node: Any, terms: list[_Mean], sums: list[torch.Tensor | float]) -> None:
    """Follow what adds up and scales down to the means."""
    name = "" if node is None else node.name()
    following = [] if node is None else [inner for inner, _ in node.next_functions if inner is not None]
    if name in _CLASSES and node._saved_reduction == _MEAN:
        terms.append(_Mean(_divisor(node), node._saved_target.numel()))
    elif name in _ELEMENTS and node._saved_reduction == _MEAN:
        terms.append(_Mean(node._saved_self.numel(), node._saved_self.numel()))
    elif name in _MEANS and not _of_scalars(node):
        terms.append(_Mean(node._saved_self_sym_numel, node._saved_self_sym_numel))
    elif name in _AS_IT_IS or name in _SUMS:
        for inner in following:
            _walk(inner, terms, sums)
    elif name in _SCALES and len(following) == 1:  # by what has no gradient
        summed = _summed(following[0])
        if summed is None:
            _walk(following[0], terms, sums)
        elif not name.startswith("Div"):
            raise _Unknown
        elif summed.name() in _CLASSES and float(node._saved_other) == float(_divisor(summed)):
            terms.append(_Mean(_divisor(summed), summed._saved_target.numel()))
        else:
            sums.append(node._saved_other)
    else:
        raise _Unknown


def _summed(node: Any) -> Any:
    """The sum that a node is, whatever its sign; None where it is none."""
    while node.name() in _AS_IT_IS:
        node = node.next_functions[0][0]
        if node is None:
            raise _Unknown
    if node.name().startswith("SumBackward") or getattr(node, "_saved_reduction", None) == _SUM:
        return node
    return None


def _of_scalars(node: Any) -> bool:
    """Whether a mean is one of whole losses that were put side by side."""
    inner = node.next_functions[0][0]
    return (
        inner is not None
        and inner.name() == "StackBackward0"
        and len(inner.next_functions) == node._saved_self_sym_numel
    )


def _divisor(node: Any) -> Any:
    if node._saved_weight is not None or node._saved_total_weight.dtype in _COUNTS_EXACTLY:
        return node._saved_total_weight
    ignored = node._saved_ignore_index  # half precision cannot count beyond 256 or 2048
    return (node._saved_target != (ignored - 2**64 if ignored >= 2**63 else ignored)).sum()


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Where no gradients are wanted, let the graph of a loss be there without the memory that backward would need."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_outline, _same):
        yield


def _outline(tensor: torch.Tensor) -> torch.Tensor:
    small = tensor.numel() <= 1 or tensor.dtype is torch.int64  # divisors and labels
    return tensor.detach() if small else torch.empty_like(tensor, device="meta")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
