"""Numerically verifies a traced forward: its outputs and gradients must be those of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbdist.core.params.preserve_model import device_of, preserve_model
from nbdist.core.process.rng import seed_all, seed_torch
from nbdist.core.strategies.pipeline.partition.build_stage import build
from nbdist.core.strategies.pipeline.partition.call_signature import leaves_of
from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.effects import SEED, Effect, to_tensor
from nbdist.core.strategies.pipeline.partition.tracing import cannot_split

__all__ = ["ForwardResult", "verify_trace"]


@dataclass(frozen=True, kw_only=True)
class ForwardResult:
    """Outputs and gradients of a forward, under fixed random numbers.

    Args:
        output: The tensors in the output.
        gradients: Three sums over the gradient of each trainable parameter, ``(3,)``: all gradients may not fit.
        left: The buffers and other attributes after the forward; after another one too, if it changed them: that one
            tells whether the changes count.
    """

    output: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    left: list[torch.Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, forward: Callable[..., Any], values: Sequence[torch.Tensor], effects: Sequence[Effect]
    ) -> ForwardResult:
        """Run `forward`, which uses the parameters of `model`, on tensors. Local; the model is left unchanged."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        with preserve_model(model):
            before = _left(model, ())
            seed_all(SEED)
            seed_torch(SEED, device_of(model))
            output = _tensors(forward(*(value.clone() for value in values)))
            left = _left(model, effects)
            losses = [_magnitude(tensor).mean() for tensor in output if tensor.requires_grad]
            gradients = _sums_of_gradients(sum(losses), parameters) if losses and parameters else []
            if effects or not _same(before, left):
                with torch.no_grad():
                    again = _tensors(forward(*(value.clone() for value in values)))
                    left += [*again, *_left(model, effects)]
        return cls(output=output, gradients=gradients, left=left)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)]


def _left(model: nn.Module, effects: Sequence[Effect]) -> list[torch.Tensor]:
    """Copies of the buffers, but those of torch's own modules, and of the values of the effects."""
    modules = dict(model.named_modules())
    owners = [module for module in modules.values() if not type(module).__module__.startswith("torch.nn.")]
    buffers = [buffer for module in owners for buffer in module.buffers(recurse=False)]
    attributes = [leaf for e in effects for leaf in leaves_of(vars(modules[e.module]).get(e.name))]
    sendable = [to_tensor(leaf) for leaf in attributes if isinstance(leaf, (torch.Tensor, int, float, complex))]
    return [tensor.detach().clone() for tensor in (*buffers, *sendable)]


def _magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().square() if tensor.is_complex() else tensor.square()


def _sums_of_gradients(loss: Any, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """Sums over the gradient of each parameter, freed one by one in backward; existing gradients are restored."""
    kept, sums = [parameter.grad for parameter in parameters], dict[nn.Parameter, torch.Tensor]()

    def take(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        flat = gradient.to_dense().flatten()
        slope = torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device)
        sums[parameter] = torch.stack([flat.sum(), flat.abs().sum().to(flat.dtype), flat.mul_(slope).sum()])

    hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
    finally:
        for hook, parameter, gradient in zip(hooks, parameters, kept, strict=True):
            hook.remove()
            parameter.grad = gradient
    return [sums.get(parameter) for parameter in parameters]


_WITHOUT_GRADIENTS = "computes gradients its own way (torch.no_grad, an autograd.Function, a reentrant checkpoint), "


def verify_trace(
    crossings: Crossings, values: Sequence[torch.Tensor], expected: ForwardResult, effects: Sequence[Effect]
) -> None:
    """Compare outputs, gradients and what is left of the traced forward with the model's own, for a call. Local.

    A trace loses what Python does beside the operations: random numbers of `random`, ``torch.no_grad()`` (in torch.fx),
    a test of a value's type.

    Raises:
        TaskError: They differ.
    """
    model = crossings.trace.model
    actual = ForwardResult.of(model, build(crossings, 0, len(crossings.body)), values, effects)
    for what, agree in (
        ("outputs", _same(expected.output, actual.output)),
        ("gradients", _same(expected.gradients, actual.gradients)),
        ("buffers or attributes", _same(expected.left, actual.left)),
    ):
        if not agree:
            raise cannot_split(
                model, "", f"the traced operations give other {what} than the model, for instance because forward "
                f"{_WITHOUT_GRADIENTS if what == 'gradients' else ''}draws random numbers with Python, or keeps values "
                "from call to call"
            )  # fmt: skip


def _same(first: Sequence[torch.Tensor | None], second: Sequence[torch.Tensor | None]) -> bool:
    return len(first) == len(second) and all(map(_close, first, second))


def _close(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two values are equal up to the rounding of another summation order."""
    if first is None or second is None:
        return all(one is None or not one.any() for one in (first, second))
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not (first.dtype.is_floating_point or first.dtype.is_complex):
        return bool((first == second).all())
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    scale = tolerance * first.detach().nan_to_num(0, 0, 0).abs().max() if first.numel() else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=float(scale), equal_nan=True)
