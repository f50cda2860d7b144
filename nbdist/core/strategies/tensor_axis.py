"""The ``tp`` axis: single layers are split over its ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from nbdist.core.data.reader import copy_batch
from nbdist.core.params.preserve_model import preserve_model
from nbdist.core.strategies import tensor as tensor_parallel
from nbdist.core.strategies.mesh_axis import Example, MeshAxis, Proposal
from nbdist.core.strategies.mesh_cost import AxisCost
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["TensorAxis"]


class TensorAxis(MeshAxis):
    """Tensor parallelism. See `MeshAxis`."""

    _parallelized: tensor_parallel.Parallelized | None = None

    @classmethod
    def propose(cls, task: Task, plan: Plan, example: Example) -> Proposal:
        """See `MeshAxis`; what changes results is left out only when the plan is applied, and verified."""
        model, size, rules = task.model, plan.mesh.tp, plan.tensor_plan
        if rules is None:
            proposed = tensor_parallel.derive_plan(model, size, *example)
        else:
            proposed = tensor_parallel.plan_from_rules(model, size, rules, *example)
        shares = dict.fromkeys(tensor_parallel.cuts(model, proposed.groups), 1 / size)
        moved = _bytes_summed(model, proposed, example)
        return Proposal(proposed.to_dict(), AxisCost(shares=[shares], moved=moved))

    def apply(self, proposal: Proposal, example: Example) -> None:
        """See `MeshAxis`."""
        placements = self.placements
        model, channel = placements.task.model, placements.channels.tp
        proposed = tensor_parallel.TensorPlan.from_dict(proposal.data)
        verified = tensor_parallel.verify_plan(model, channel, proposed, *example)
        self._parallelized = tensor_parallel.parallelize(model, channel, verified)
        placements.readable.guard_split(self._parallelized)
        for name, cut in self._parallelized.cuts.items():
            placements.record(name, cut=cut)
            placements.release(name)

    def dry_run(self) -> contextlib.AbstractContextManager[None]:
        """See `MeshAxis`."""
        return tensor_parallel.dry_run(self._parallelized)

    def close(self) -> None:
        """See `MeshAxis`."""
        if self._parallelized is not None:
            self._parallelized.restore()


def _bytes_summed(model: nn.Module, plan: tensor_parallel.TensorPlan, example: Example) -> int:
    """Bytes of the activations, and of their gradients, that split layers sum or gather for the example. Local."""
    total = 0

    def count(group: int, kind: str) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal total
            if kind != "column":
                total += (output[0] if isinstance(output, tuple) else output).nbytes
            if kind in ("column", "column_gather", "attention"):  # layers that read one tensor share its gradient's sum
                read = {id(x): x for x in args if isinstance(x, torch.Tensor) and x.requires_grad}
                fresh = [x for key, x in read.items() if kind != "column" or (group, key) not in seen]
                seen.update({(group, key): x for key, x in read.items()})  # held, so that no id comes twice
                total += sum(x.nbytes for x in fresh)

        return hook

    seen: dict[tuple[int, int], torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(count(number, kind))
        for number, group in enumerate(plan.groups)
        for name, kind in group.layers.items()
    ]
    try:
        with preserve_model(model):
            args, kwargs = copy_batch(example)
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return total
