"""Whether a recorded forward computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbdist.core.params.preserve import device_of, untouched
from nbdist.core.process.rng import seed_all, seed_torch
from nbdist.core.strategies.pipeline.partition.build_stage import build
from nbdist.core.strategies.pipeline.partition.call import leaves_of
from nbdist.core.strategies.pipeline.partition.crossings import Crossings
from nbdist.core.strategies.pipeline.partition.tracing import cannot_split

__all__ = ["Answer", "check_agrees"]

SEED = 7_352_801  # not the user's: numbers that were drawn while recording differ from those drawn now


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a forward gives for some values, under fixed random numbers.

    Args:
        output: The tensors in it.
        gradients: Of each parameter that takes one, a few sums over it, ``(3,)``: all gradients at once may not fit.
    """

    output: list[torch.Tensor]
    gradients: list[torch.Tensor | None]

    @classmethod
    def of(cls, model: nn.Module, forward: Callable[..., Any], values: Sequence[torch.Tensor]) -> Answer:
        """Run `forward`, which works with the parameters of `model`, on tensors. Local; the model is left as it was."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        with untouched(model):
            seed_all(SEED)
            seed_torch(SEED, device_of(model))
            leaves = leaves_of(forward(*(value.clone() for value in values)))
            output = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            losses = [tensor.square().mean() for tensor in output if tensor.requires_grad]
            gradients = _sums_of_gradients(sum(losses), parameters) if losses and parameters else []
        return cls(output=output, gradients=gradients)


def _sums_of_gradients(loss: Any, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """Sums over the gradient of each parameter, none of which outlives them; the parameters keep what they have."""
    kept, sums = [parameter.grad for parameter in parameters], dict[nn.Parameter, torch.Tensor]()

    def take(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        flat = gradient.flatten()
        slope = torch.linspace(1, 2, flat.numel(), dtype=flat.dtype, device=flat.device)
        sums[parameter] = torch.stack([flat.sum(), flat.abs().sum(), flat.mul_(slope).sum()])

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


def check_agrees(flow: Crossings, values: Sequence[torch.Tensor], expected: Answer) -> None:
    """Compare outputs and gradients of the recorded forward with the model's own, for the tensors of a call. Local.

    What Python does beside the operations is lost in recording: random numbers of `random`, ``torch.no_grad()`` (in
    torch.fx), a question for a value's type. Then the two differ.

    Raises:
        TaskError: They do.
    """
    actual = Answer.of(flow.trace.model, build(flow, 0, len(flow.body)), values)
    for what, agree in (
        ("outputs", _same(expected.output, actual.output)),
        ("gradients", _same(expected.gradients, actual.gradients)),
    ):
        if not agree:
            raise cannot_split(
                flow.trace.model, "", f"the recorded operations give other {what} than the model, for instance "
                "because forward draws random numbers with Python, or keeps values from call to call"
            )  # fmt: skip


def _same(first: Sequence[torch.Tensor | None], second: Sequence[torch.Tensor | None]) -> bool:
    return len(first) == len(second) and all(map(_close, first, second))


def _close(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two values differ by no more than operations that sum in another order may make them differ."""
    if first is None or second is None:
        return all(one is None or not one.any() for one in (first, second))
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if not first.dtype.is_floating_point:
        return bool((first == second).all())
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    scale = tolerance * first.detach().nan_to_num(0, 0, 0).abs().max() if first.numel() else 0.0
    return torch.allclose(first, second, rtol=tolerance, atol=float(scale), equal_nan=True)
