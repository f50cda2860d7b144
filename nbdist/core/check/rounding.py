"""Rounding: whether two results of a step differ by more than the step's own rounding explains."""

from __future__ import annotations

import copy
import math

import torch

from nbdist.core.check.plain_step import StepResult

__all__ = ["Rounding"]

_MANY, _FEW = 1000.0, 4.0
"""How many times the measured rounding is allowed: many while that stays below `_SMALL` of the value, else few."""
_SMALL = 2e-3
_SCALE = 5e-3
"""The largest error of a tensor's scale that is allowed, where its elements are rounded coarsely."""
_ULPS = 16


class Rounding:
    """What rounding alone does to a step, measured: the same step with half of its weights changed in their last bit.

    So a result that is ill-conditioned, or computed in half precision, has a wide tolerance, and all others a narrow
    one.

    Args:
        plain: The result of the step.
        nudged: That with the changed weights.
        coarsest_eps: The relative rounding of the coarsest numbers, as far as it is known; see `PlainStep`.
    """

    def __init__(self, plain: StepResult, nudged: StepResult, *, coarsest_eps: float = 0.0) -> None:
        self._noise = {("loss", ""): abs(plain.loss - nudged.loss)}
        for name in plain.logged.keys() & nudged.logged.keys():
            self._noise["log", name] = abs(plain.logged[name] - nudged.logged[name])
        for kind, first, second in (
            ("gradient", plain.gradients, nudged.gradients), ("buffer", plain.buffers, nudged.buffers),
        ):  # fmt: skip
            for name, value in first.items():
                other = second.get(name)
                if value is not None and other is not None and other.shape == value.shape:
                    self._noise[kind, name] = _norm(value.double() - other.double())
        gradients = [gradient for gradient in plain.gradients.values() if gradient is not None]
        self._largest = max(map(_norm, gradients), default=0.0)
        self._loss_dtype = plain.dtype
        dtypes = {plain.dtype, *(gradient.dtype for gradient in gradients)}
        self._coarsest_eps = max([coarsest_eps, *(torch.finfo(dtype).eps for dtype in dtypes)])
        self._reordered_eps = 0.0

    def reordered(self) -> Rounding:
        """The same for a result that adds in another order, as over a whole batch or with split layers.

        It may be off by some roundings of the coarsest numbers in the step, though the changed weights did not show it.
        """
        other = copy.copy(self)
        other._reordered_eps = self._coarsest_eps
        return other

    def differs_loss(self, expected: float, got: float) -> bool:
        """Whether two mean losses differ by more than rounding."""
        # Ranks without a parameter in float64 sum losses in float32.
        eps = max(torch.finfo(self._loss_dtype).eps, torch.finfo(torch.float32).eps)
        noise, size = self._noise["loss", ""], abs(expected)
        # A loss in half precision is rounded in each slice, by half of its last bit; more if its sums are other ones.
        ulps = _ULPS if eps <= _SMALL else _FEW if self._reordered_eps else 1
        return abs(got - expected) > max(_allowed(noise, size), ulps * eps * size)

    def differs_log(self, name: str, expected: float, got: float) -> bool:
        """Whether two means of a number that the step logs differ by more than rounding."""
        if not (math.isfinite(expected) and math.isfinite(got)):
            return math.isfinite(expected) != math.isfinite(got)
        noise, size = self._noise.get(("log", name), 0.0), abs(expected)
        return abs(got - expected) > max(_FEW * noise, _SMALL * size, _ULPS * self._coarsest_eps * max(size, 1.0))

    def differs(self, kind: str, name: str, expected: torch.Tensor, got: torch.Tensor) -> bool:
        """Whether two values of a tensor, or of the same part of it, differ by more than rounding.

        Args:
            kind: "gradient" or "buffer".
            name: The tensor's.
            expected: As in the plain step.
            got: On the mesh.
        """
        if expected.shape != got.shape:
            return True
        if not (expected.is_floating_point() or expected.is_complex()):
            return not torch.equal(expected, got.to(expected.dtype))
        eps = max(torch.finfo(expected.dtype).eps, self._reordered_eps)
        expected, got = _double(expected), _double(got)
        finite = expected.isfinite()
        if not torch.equal(finite, got.isfinite()):
            return True
        expected, got = expected.where(finite, 0.0), got.where(finite, 0.0)
        norm, off, noise = _norm(expected), _norm(got - expected), self._noise.get((kind, name), 0.0)
        if kind == "gradient":  # one that cancels, such as that of a shift before a softmax, is made of rounding
            noise = max(noise, self._reordered_eps * self._largest)
        allowed = max(_allowed(noise, norm), _ULPS * eps * norm)
        if kind == "gradient" and not norm:  # of one that cancels to zero, what is left by rounding elsewhere
            allowed = _ULPS * eps * self._largest
        if off > allowed:
            return True
        if allowed <= _SCALE * norm or noise > 0.3 * norm or not norm:
            return False
        # Errors of elements cancel in the scale of the whole tensor, so there it shows if it is too large as a whole.
        scale = float((expected.flatten() * got.flatten()).sum().real) / norm**2
        allowed = max(6 * noise / norm, 2 * eps) / math.sqrt(expected.numel())
        return abs(scale - 1) > max(
            _SCALE, 2 * self._reordered_eps, allowed
        )  # a slice's share of the batch is rounded too


def _allowed(noise: float, size: float) -> float:
    """How far a value of some size may be off, given the measured rounding."""
    return max(_FEW * noise, min(_MANY * noise, _SMALL * size))


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(_double(tensor)))
