"""Numerically verifies a tensor-parallel plan: runs the module whole and split, and compares outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.data.reader import copy_batch
from nbdist.core.data.sources import tensors_in
from nbdist.core.params.last_bits import nudge_
from nbdist.core.params.param_table import replace_data
from nbdist.core.params.preserve_model import device_of, preserve_model
from nbdist.core.process.rng import seed_torch
from nbdist.core.strategies.tensor.apply import parallelize
from nbdist.core.strategies.tensor.auto_plan import nothing_to_split
from nbdist.core.strategies.tensor.plan import Group, TensorPlan
from nbdist.errors import PeerLostError, PlanError

__all__ = ["verify_plan"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
_COARSE_TOLERANCE = 5e-2
_NOISES = 4
"""How many times what a change of weights in their last bit makes, if they are in half precision."""
_SEED = 1


def verify_plan(
    model: nn.Module, channel: Channel, plan: TensorPlan, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> TensorPlan:
    """Keep the groups of a plan that leave outputs and gradients unchanged. **Collective** over `channel`.

    The example runs whole and split, in training mode with the same random numbers, and in evaluation mode. If the
    whole plan gives other results, groups with the same key are tried by themselves, in each of their ways to split.

    Args:
        model: The whole module, with the same weights on every rank; it is left unchanged.
        channel: The ``tp`` axis.
        plan: From `derive_plan` or `plan_from_rules`.
        args: Arguments of an example call, the same on every rank, with at least two samples.
        kwargs: Its keyword arguments.

    Raises:
        PlanError: The user's plan changes results, or nothing is left to split.
    """
    verifier = _Verifier(model, channel, args, kwargs or {})
    wrong = verifier.mismatch(plan, plan.groups)
    if not wrong:
        return replace(plan, others=())
    groups, reasons = _selected(verifier, plan)
    if any(group.kind == "own" for group in plan.groups) and reasons.keys() - plan.reasons.keys():
        name = min(reasons.keys() - plan.reasons.keys())
        raise PlanError(
            f"the tensor plan changes what {type(model).__name__} computes: {name} {reasons[name]}. "
            "Leave it out, or name the 'row' layer that takes the output of the 'column', or split it as "
            "'column_gather'."
        )
    if not groups:
        raise nothing_to_split(model, plan.size, reasons)
    return TensorPlan(size=plan.size, groups=groups, reasons=reasons)


def _selected(verifier: _Verifier, plan: TensorPlan) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups that leave results unchanged, alone and together; and why the other layers stay whole."""
    reasons = dict(plan.reasons)
    chosen: list[Group] = []
    for key in dict.fromkeys(group.key for group in plan.groups):
        first_mismatch = ""
        for way in _ways(plan, key):
            mismatch = (
                verifier.mismatch(plan, [*chosen, *way]) if any(group.layers for group in way) else "nothing left"
            )
            if not mismatch:
                chosen += way
                reasons |= {
                    group.block: f"is split layer by layer, not as a whole: {first_mismatch}"
                    for group in way
                    if group.kind == "linear" and first_mismatch
                }
                break
            first_mismatch = first_mismatch or mismatch
        left = {name for group in plan.groups if group.key == key for name in group.layers}
        left -= {name for group in chosen for name in group.layers}
        reasons |= dict.fromkeys(sorted(left), f"gives other results if split as {key.split(':')[0]}: {first_mismatch}")
    return tuple(group for group in chosen if group.layers), reasons


def _ways(plan: TensorPlan, key: str) -> Iterator[list[Group]]:
    """All groups of a key, each in its first way to split; then each in its second, ..."""
    by_block = [
        [group, *(other for other in plan.others if (other.key, other.block) == (key, group.block))]
        for group in plan.groups
        if group.key == key
    ]
    for number in range(max(map(len, by_block))):
        yield [ways[min(number, len(ways) - 1)] for ways in by_block]


class _Verifier:
    def __init__(self, model: nn.Module, channel: Channel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._channel = model, channel
        self._args, self._kwargs = args, kwargs
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = [(p, p.grad) for p in model.parameters()]
        self._expected = self._results()
        self._noise = self._measured_noise()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    def _measured_noise(self) -> dict[str, float]:
        """How far a change of half-precision weights in their last bit moves each result."""
        if all(p.dtype in _TOLERANCE for p in self._trainable.values()):
            return {}
        wholes = [(p, p.detach().clone()) for p in self._model.parameters()]
        try:
            nudge_(p for p, _ in wholes)
            nudged = self._results()
        finally:
            with torch.no_grad():
                for parameter, whole in wholes:
                    parameter.copy_(whole)
        pairs = {name: (whole, nudged.get(name)) for name, whole in self._expected.items() if whole.numel()}
        return {
            name: _NOISES * _apart(whole, other)
            for name, (whole, other) in pairs.items()
            if other is not None and other.shape == whole.shape
        }

    def mismatch(self, plan: TensorPlan, groups: Iterable[Group]) -> str:
        """How results differ if these groups are split, on any rank; an empty string if not. **Collective**."""
        found = self._local_mismatch(replace(plan, groups=tuple(groups)))
        mismatches = torch.tensor([float(bool(found))], device=self._channel.device)
        self._channel.all_reduce_(mismatches)
        return found or ("results differ on another rank" if mismatches.item() else "")

    def _local_mismatch(self, plan: TensorPlan) -> str:
        gradients = [(p, p.grad) for p in self._model.parameters()]
        wholes = [(p, p.data) for p in self._model.parameters()]
        split = parallelize(self._model, self._channel, plan)
        try:
            actual = self._results()
        except PeerLostError:
            raise
        except Exception as error:  # the user's code may fail on split layers: then they stay whole
            return f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            split.restore()
            for parameter, whole in wholes:
                if parameter.shape != whole.shape:
                    replace_data(parameter, whole)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        rank, size = self._channel.rank, self._channel.size
        expected = dict(self._expected)
        for name, cut in split.cuts.items():
            if (gradient := expected.get(f"gradient of {name}")) is not None:
                expected[f"gradient of {name}"] = cut.part(gradient, rank, size)
        return _difference(expected, actual, self._noise)

    def _results(self) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name."""
        with preserve_model(self._model):
            self._model.train()
            seed_torch(_SEED, device_of(self._model))
            outputs = _floats(self._called())
            gradients = self._gradients(outputs)
            results = {f"output {number} in training": out.detach() for number, out in enumerate(outputs)}
            results |= {f"gradient of {name}": g for name, g in gradients.items()}
            self._model.eval()
            with torch.no_grad():
                evaluated = _floats(self._called())
        return results | {f"output {number} in evaluation": out for number, out in enumerate(evaluated)}

    def _called(self) -> Any:
        args, kwargs = copy_batch((self._args, self._kwargs))  # a forward may write into its inputs
        return self._model(*args, **kwargs)

    def _gradients(self, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        differentiable = [out for out in outputs if out.requires_grad]
        if not differentiable or not self._trainable:
            return {}
        # Weighted sum: the plain sum of a softmax, for instance, has no gradient.
        loss = sum(
            (out * torch.arange(out.numel(), device=out.device).cos().view_as(out)).sum() for out in differentiable
        )
        # Not `torch.autograd.grad`, which reentrant checkpointing forbids.
        for parameter in self._trainable.values():
            parameter.grad = None
        loss.backward()  # type: ignore[union-attr]
        found = {name: p.grad.to_dense() for name, p in self._trainable.items() if p.grad is not None}
        for parameter in self._trainable.values():
            parameter.grad = None
        return found


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first.nan_to_num() - second.nan_to_num()).abs().max().item()


def _floats(output: Any) -> list[torch.Tensor]:
    known = isinstance(output, (torch.Tensor, tuple, list, dict))
    return [out for out in tensors_in(output if known else vars(output)) if out.is_floating_point()]


def _difference(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], noise: dict[str, float]) -> str:
    """The first result that differs, or an empty string."""
    if expected.keys() != actual.keys():
        return f"there is no {min(expected.keys() ^ actual.keys())}"
    largest = max(
        (g.abs().max().item() for name, g in expected.items() if "gradient" in name and g.numel()), default=0.0
    )
    for name, right in expected.items():
        got = actual[name]
        if got.shape != right.shape:
            return f"{name} has shape {tuple(got.shape)}, not {tuple(right.shape)}"
        if not right.numel():
            continue
        off = _apart(right, got)
        # A gradient that is rounding only, such as that of a key's bias, is compared on the scale of the largest one.
        scale = max(right.nan_to_num().abs().max().item(), 0.01 * largest if "gradient" in name else 0.0)
        if off > max(_TOLERANCE.get(right.dtype, _COARSE_TOLERANCE) * scale, noise.get(name, 0.0)):
            return f"{name} is off by {off:.2g} of {scale:.2g}"
    return ""
