"""The weight of a loss: what it is a mean over (tokens, unmasked labels, samples), read from its autograd graph.

A model or a callable that computes its own loss does not return the number that it averages over. But the operation
that computed the mean saved its divisor for backward: reading it needs no hooks, and costs a few attribute accesses.
In doubt the answer is "unknown".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Mean", "counted_targets", "is_constant", "is_number", "mean_over"]

_AS_IT_IS = {
    "AliasBackward0", "CloneBackward0", "NegBackward0", "ReshapeAliasBackward0", "RsubBackward1", "SqueezeBackward0",
    "SqueezeBackward1", "SqueezeBackward2", "ToCopyBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0",
    "ViewBackward0",
}  # fmt: skip
_SUMS = {"AddBackward0", "SubBackward0"}
_SCALES = {"MulBackward0", "MulBackward1", "DivBackward0", "DivBackward1"}
_CLASSES = {"NllLossBackward0", "NllLoss2DBackward0"}
_ELEMENTS = {
    "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0", "HuberLossBackward0", "MseLossBackward0",
    "SmoothL1LossBackward0", "SoftMarginLossBackward0",
}  # fmt: skip
_ROWS = {"MultiMarginLossBackward0", "MultilabelMarginLossBackward0"}
_MEANS = {"MeanBackward0", "MeanBackward1"}
_OF_ONE = {
    "AbsBackward0", "CatBackward0", "DotBackward0", "ExpBackward0", "LinalgVectorNormBackward0", "LogBackward0",
    "MeanBackward0", "MeanBackward1", "MmBackward0", "NormBackward0", "NormBackward1", "PowBackward0",
    "SigmoidBackward0", "SoftplusBackward0", "SqrtBackward0", "StackBackward0", "SumBackward0", "SumBackward1",
    "TBackward0", "TransposeBackward0",
}  # fmt: skip
"""Operations whose result, if computed from parameters alone, is the same for every slice."""
_MEAN, _SUM = 1, 2  # torch's own numbers for `reduction`
_COUNTS_EXACTLY = (torch.float32, torch.float64)
_EXACT_BELOW = 2**24  # in float32
_AGREES = 1e-6  # two sums of the same class weights may differ by so much


class Mean(NamedTuple):
    """How a loss is averaged with those of other slices.

    Args:
        over: Its weight: a number or a scalar tensor.
        form: What must be the same in every slice: factors, and elements per sample; empty for a plain mean.
        factors: Of all terms.
        numbers: Whole numbers among the factors, and the number of terms.
        counts: Those of them that may be counts of this slice, so that the loss were a sum; see `LossForms`.
    """

    over: Any
    form: tuple[float, ...]
    factors: tuple[float, ...] = ()
    numbers: frozenset[float] = frozenset()
    counts: frozenset[float] = frozenset()


class _Term(NamedTuple):
    """A term of a loss: a mean's divisor, its number of elements (ignored ones included), and the term's factor."""

    over: Any
    elements: int
    factor: float


class _Unknown(Exception):
    """A term is not a mean, or what it is a mean over cannot be read."""


def mean_over(loss: torch.Tensor, samples: int, constants: Callable[[], Iterable[torch.Tensor]] = tuple) -> Mean | None:
    """The weight with which `loss` averages exactly with the losses of other slices. Local.

    Args:
        loss: A scalar with a graph: computed with gradients enabled, or a `LossGraph`'s twin.
        samples: Samples in the slice.
        constants: Tensors that do not depend on the batch; parameters need not be listed.

    Returns:
        None if the graph does not show it. Several terms must all be means over the same number, or each over all
        elements of every sample: then the weight is `samples`. A term of parameters alone averages with any weight.
    """
    found = _Terms(constants)
    try:
        found.walk(loss.grad_fn, 1.0)
        terms = found.resolved(samples)
    except (_Unknown, AttributeError, ZeroDivisionError):  # node names and saved attributes depend on torch's version
        return None
    factors = tuple(term.factor for term in terms)
    numbers, counts = found.numbers(samples, terms)
    if len(terms) >= samples > 2 and len(terms) % samples == 0 and len({*factors}) == 1:  # a loop over samples?
        counts |= {len(terms)}
    if len(terms) == 1 or len({(float(term.over), term.elements) for term in terms}) == 1:
        form = factors if any(factor != 1 for factor in factors) else ()
        return Mean(terms[0].over, form, factors, numbers, counts)
    each = tuple(term.elements / max(1, samples) for term in terms)
    every = all(float(t.over) == t.elements for t in terms) and all(e.is_integer() for e in each)
    return Mean(samples, factors + each, factors, numbers, counts) if every else None


def counted_targets(loss: torch.Tensor) -> int | None:
    """How many targets a mean over classes has counted, as it saved it for backward. Local; waits for a GPU.

    Returns:
        None if `loss` is no such mean itself, weights classes, has no graph, or saved a number that may be rounded.
    """
    node: Any = loss.grad_fn
    if node is None or node.name() not in _CLASSES or node._saved_weight is not None:
        return None
    total = node._saved_total_weight
    exact = total.dtype in _COUNTS_EXACTLY and node._saved_target.numel() < _EXACT_BELOW
    return int(total.item()) if exact else None


class _Terms:
    """Walks the graph through sums and scalings down to the means."""

    def __init__(self, constants: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._constants = constants
        self._terms: list[_Term] = []
        self._sums: list[tuple[Any, int, float]] = []  # of sums divided by hand: divisor, elements, factor
        self._integers: list[float] = []  # integer factors, which may be counts

    def walk(self, node: Any, factor: float) -> None:
        name = "" if node is None else node.name()
        if name in _CLASSES and node._saved_reduction == _MEAN:
            self._terms.append(_Term(_divisor(node), node._saved_target.numel(), factor))
        elif name in _ELEMENTS and node._saved_reduction == _MEAN:
            self._every(node._saved_self.numel(), factor)
        elif name in _ROWS and node._saved_reduction == _MEAN:
            self._every(len(node._saved_self) if node._saved_self.ndim > 1 else 1, factor)
        elif is_constant(node):
            pass
        elif name in _MEANS and not _of_scalars(node):
            self._check_inside(node)
            self._every(node._saved_self_sym_numel, factor)
        elif name in _AS_IT_IS or name in _SUMS:
            for inner, _ in node.next_functions:
                if inner is not None:
                    self.walk(inner, factor)
        elif name in _SCALES:
            self._scale(node, name.startswith("Div"), factor)
        else:
            raise _Unknown

    def _every(self, elements: int, factor: float) -> None:
        self._terms.append(_Term(elements, elements, factor))

    def _scale(self, node: Any, divides: bool, factor: float) -> None:
        inner, other = _scaled(node, divides)
        if not divides and (other == 0 if not isinstance(other, torch.Tensor) else is_number(other) and other == 0):
            return  # a term times zero, there only so that gradients reach its parameters
        summed = _summed(inner)
        if summed is None:
            number = self._number(other)
            if float(number).is_integer():
                self._integers.append(number)
            self.walk(inner, factor / number if divides else factor * number)
        elif not divides:
            raise _Unknown
        elif summed.name() in _CLASSES and float(other) == float(_divisor(summed)):
            self._terms.append(_Term(_divisor(summed), summed._saved_target.numel(), factor))
        else:
            over = other.detach() if isinstance(other, torch.Tensor) else other
            self._sums.append((over, _elements(summed), factor))

    def _number(self, other: Any) -> Any:
        """A factor that does not depend on the batch; 1 for a tensor, because reading it would wait for the GPU."""
        if not isinstance(other, torch.Tensor):
            return other
        if is_number(other):
            return other.item()
        if other.grad_fn is None and not any(other is constant for constant in self._constants()):
            raise _Unknown
        if other.grad_fn is not None and not is_constant(other.grad_fn):
            raise _Unknown
        return 1.0

    def _check_inside(self, node: Any) -> None:
        """Raise if the elements below a mean are scaled by a scalar that depends on the batch."""
        inner = node.next_functions[0][0]
        while inner is not None and (inner.name() in _AS_IT_IS or inner.name() in _SCALES):
            if inner.name() in _AS_IT_IS:
                inner = inner.next_functions[0][0]
                continue
            live = [edge for edge, _ in inner.next_functions if edge is not None]
            if len(live) > 1:
                return
            inner, other = _scaled(inner, inner.name().startswith("Div"))
            if isinstance(other, torch.Tensor) and other.ndim == 0:
                self._number(other)

    def resolved(self, samples: int) -> list[_Term]:
        """All terms, with the sums divided by hand: by the number of samples or elements, or another term's divisor."""
        terms = list(self._terms)
        for divisor, elements, factor in self._sums:
            value = float(divisor)
            same = [term for term in self._terms if math.isclose(value, float(term.over), rel_tol=_AGREES)]
            if not same and value not in (samples, elements):
                raise _Unknown
            every = samples if value == samples else elements
            terms.append(same[0]._replace(factor=factor) if same else _Term(every, every, factor))
        return terms or [_Term(samples, samples, 1.0)]

    def numbers(self, samples: int, terms: list[_Term]) -> tuple[frozenset[float], frozenset[float]]:
        """The whole numbers by which means are scaled, and those that may be counts: such a product is a sum again."""
        counts = {samples, *(term.elements for term in terms), *(float(t.over) for t in terms if self._integers)} - {1}
        return frozenset({*self._integers, len(terms)}), frozenset(counts.intersection(self._integers))


def _scaled(node: Any, divides: bool) -> tuple[Any, Any]:
    """The node that is scaled, and the factor."""
    edges = [edge for edge, _ in node.next_functions]
    if len(edges) == 1 or edges[1] is None:
        return edges[0], node._saved_other
    if edges[0] is not None and (divides or is_constant(edges[1])):
        return edges[0], node._saved_other
    if divides:
        raise _Unknown
    return edges[1], node._saved_self


def is_constant(node: Any) -> bool:
    """Whether a node is computed from parameters alone."""
    if node is None:
        return False
    name = node.name()
    if name.endswith("AccumulateGrad"):
        return isinstance(node.variable, nn.Parameter)
    edges = [edge for edge, _ in node.next_functions]
    if name in _SCALES and len(edges) == 2 and None in edges:
        other = node._saved_other if edges[1] is None else node._saved_self
        if isinstance(other, torch.Tensor) and not is_number(other):
            return False
        edges.remove(None)
    known = name in _OF_ONE or name in _AS_IT_IS or name in _SUMS or name in _SCALES
    return known and all(is_constant(edge) for edge in edges)


def is_number(tensor: torch.Tensor) -> bool:
    """Whether a tensor wraps a Python number, which does not take part in type promotion."""
    least = {torch.float64: torch.float16, torch.int64: torch.uint8}.get(tensor.dtype)
    return least is not None and tensor.ndim == 0 and torch.result_type(torch.zeros((), dtype=least), tensor) is least


def _summed(node: Any) -> Any:
    """The node of a sum, behind views and signs; None if it is not a sum."""
    while node.name() in _AS_IT_IS:
        node = node.next_functions[0][0]
        if node is None:
            raise _Unknown
    if is_constant(node):
        return None
    if node.name().startswith("SumBackward") or getattr(node, "_saved_reduction", None) == _SUM:
        return node
    return None


def _elements(summed: Any) -> int:
    """The number of elements that a node sums; 0 if it does not sum single elements."""
    if hasattr(summed, "_saved_self_sym_sizes"):
        return math.prod(summed._saved_self_sym_sizes) if summed.name() == "SumBackward0" else 0
    return int(summed._saved_self.numel()) if summed.name() in _ELEMENTS else 0


def _of_scalars(node: Any) -> bool:
    """Whether a mean is taken over stacked scalars (whole losses)."""
    inner = node.next_functions[0][0]
    return (
        inner is not None
        and inner.name() == "StackBackward0"
        and len(inner.next_functions) == node._saved_self_sym_numel
    )


def _divisor(node: Any) -> Any:
    if node._saved_weight is not None or node._saved_total_weight.dtype in _COUNTS_EXACTLY:
        return node._saved_total_weight
    ignored = node._saved_ignore_index  # counted here, because half precision cannot count beyond 256 or 2048
    return (node._saved_target != (ignored - 2**64 if ignored >= 2**63 else ignored)).sum()
