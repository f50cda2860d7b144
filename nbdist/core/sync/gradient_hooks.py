"""Hooks of the user's on parameters: run once a step, on the gradient of the whole batch, as in one process.

In backward they would see a slice's share of it, or a part of it: a clamp of shares is no share of a clamp.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.placement import Placement
from nbdist.core.params.table import ParamTable
from nbdist.errors import PlanError
from nbdist.plan import Mesh

__all__ = ["GradientHooks", "check_hooks"]


class GradientHooks:
    """Takes the hooks off a model's parameters, runs them when a step's gradients are complete, and puts them back.

    Args:
        model: Before anything of ours is registered on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._taken: dict[str, tuple[Any, Any, Any]] = {}
        for name, parameter in model.named_parameters():
            before, after = _hooks(parameter)
            if before or after:
                self._taken[name] = parameter, before, after
                # None would leave torch running the latter; of an empty dict there is nothing to run.
                _put(parameter, before and OrderedDict(), after and OrderedDict())

    def run(self, table: ParamTable, axes: MeshChannels) -> None:
        """Let them have the gradients that this rank holds. **Collective** over the replica."""
        if self._taken:  # to set gradients aside costs more than to look
            with torch.no_grad():
                for name, (parameter, before, after) in self._taken.items():
                    if parameter.grad is not None:  # else it was not used, or lies elsewhere
                        self._run(parameter, before, after, table.placement(name), axes)

    def _run(self, parameter: nn.Parameter, before: Any, after: Any, placement: Placement, axes: MeshChannels) -> None:
        place: Any = parameter.grad
        placement = replace(placement, stages=None)  # who holds it on this stage has to agree, and nobody else
        gradient = place if placement.whole or not before else placement.gather(place, axes)
        for hook in list((before or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        if gradient is not place:
            place.copy_(gradient if placement.whole else placement.piece(gradient, axes).view_as(place))
        for hook in list((after or {}).values()):
            hook(parameter)
        if parameter.grad is not None and parameter.grad is not place:
            parameter.grad = place.copy_(parameter.grad)  # where it is looked for

    def put_back(self) -> None:
        """Let the parameters have them again. Local."""
        for parameter, before, after in self._taken.values():
            _put(parameter, before, after)
        self._taken.clear()


def check_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Check that hooks will see what they would in one process. Local.

    Raises:
        PlanError: They would see parts of tensors, or some of them only.
    """
    for name, parameter in model.named_parameters() if mesh.tp * mesh.shard > 1 else ():
        if _hooks(parameter)[1]:
            raise PlanError(
                f"parameter {name} has a hook that runs after its gradient is accumulated, and would see a part of it "
                f"on mesh {mesh}: use register_hook, or the strategy data or pipeline."
            )
    hooks = [getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")]
    if mesh.size > mesh.dp and any(hooks):
        raise PlanError(
            f"the optimizer has hooks around its step, which would see only what a rank holds on mesh {mesh}: override "
            "step() in a class of your own, which is tried on small tensors first, or use the strategy data."
        )


def _hooks(parameter: Any) -> tuple[Any, Any]:
    return parameter._backward_hooks, parameter._post_accumulate_grad_hooks


def _put(parameter: Any, before: Any, after: Any) -> None:
    parameter._backward_hooks, parameter._post_accumulate_grad_hooks = before, after
