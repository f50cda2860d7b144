"""The user's gradient hooks (`Tensor.register_hook`): run once a step, on the gradient of the whole batch.

In backward they would see one slice's share of the gradient, or one rank's part. Clamping each share does not clamp
their sum.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placement import Placement
from nbdist.errors import PlanError
from nbdist.plan import Mesh
from nbdist.upstream.torch_private import set_tensor_hooks, tensor_hooks

__all__ = ["GradientHooks", "check_hooks"]


class GradientHooks:
    """Removes the hooks of a model's parameters, runs them after the gradient sync, and registers them again.

    Args:
        model: The model, before nbdist registers hooks of its own on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._removed: dict[str, tuple[Any, Any, Any]] = {}
        for name, parameter in model.named_parameters():
            before, after = tensor_hooks(parameter)
            if before or after:
                self._removed[name] = parameter, before, after
                # Not None: torch would go on running post-accumulate hooks. With an empty dict it runs none.
                set_tensor_hooks(parameter, before and OrderedDict(), after and OrderedDict())

    def __len__(self) -> int:
        """How many parameters have hooks."""
        return len(self._removed)

    def run(self, table: ParamTable, axes: MeshChannels | None) -> None:
        """Run the hooks on the gradients that this rank holds. **Collective** over the replica.

        Args:
            table: The model's parameters, and where their parts lie.
            axes: This rank's channels; None where every tensor is whole: then it is local.
        """
        if self._removed:  # entering no_grad would slow steps of models without hooks
            with torch.no_grad():
                for name, (parameter, before, after) in self._removed.items():
                    if parameter.grad is not None:  # else unused, or on another rank
                        self._run(parameter, before, after, table.placement(name), axes)

    def _run(self, parameter: nn.Parameter, before: Any, after: Any, placement: Placement, axes: Any) -> None:
        held: Any = parameter.grad
        placement = replace(placement, stages=None)  # gathered over the ranks of this stage only
        gradient = held if placement.whole or not before else placement.gather(held, axes)
        for hook in list((before or {}).values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        if gradient is not held:
            held.copy_(gradient if placement.whole else placement.part(gradient, axes).view_as(held))
        for hook in list((after or {}).values()):
            hook(parameter)
        if parameter.grad is not None and parameter.grad is not held:
            parameter.grad = held.copy_(parameter.grad)  # keep the tensor that the sync reads

    def restore(self) -> None:
        """Register the hooks on the parameters again. Local."""
        for parameter, before, after in self._removed.values():
            set_tensor_hooks(parameter, before, after)
        self._removed.clear()


def check_hooks(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], mesh: Mesh) -> None:
    """Check that hooks will get the same gradients as in one process. Local.

    Raises:
        PlanError: A hook would get parts of tensors, or some parameters only.
    """
    for name, parameter in model.named_parameters() if mesh.tp * mesh.shard > 1 else ():
        if tensor_hooks(parameter)[1]:
            raise PlanError(
                f"parameter {name} has a post-accumulate-grad hook, which would get a part of the gradient on mesh "
                f"{mesh}: use register_hook, or the strategy data or pipeline."
            )
    for name, parameter in model.named_parameters():
        if any(_of_several_tensors(hook) for hook in (tensor_hooks(parameter)[0] or {}).values()):
            raise PlanError(
                f"parameter {name} has a hook of torch.autograd.graph.register_multi_grad_hook, which runs inside a "
                "backward only, and hooks of parameters run after it, on the summed gradient: use register_hook."
            )
    hooks = [getattr(one, f"_optimizer_step_{when}_hooks", None) for one in optimizers for when in ("pre", "post")]
    if mesh.size > mesh.dp and any(hooks):
        raise PlanError(
            f"the optimizer has step hooks, which would get only the parameters of one rank on mesh {mesh}: override "
            "step() in a class of your own, which is tried on small tensors first, or use the strategy data."
        )


def _of_several_tensors(hook: Any) -> bool:
    """Whether a hook was made by torch for several tensors."""
    code = getattr(hook, "__code__", None)
    return code is not None and code.co_filename == torch.autograd.graph.__file__
