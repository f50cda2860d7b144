"""Copies of the weights beside the trained ones: their moving average (EMA), and those of the best epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.param_table import ParamTable, assign_
from nbdist.core.params.placeholder import detached
from nbdist.errors import TaskError
from nbdist.plan import Plan
from nbdist.plan.monitor import Monitor

__all__ = ["BEST", "COPIES", "EMA", "WeightCopies"]

EMA = "@ema"
BEST = "@best"
COPIES = (EMA, BEST)
"""Their entries in snapshots and checkpoints, beside those of an optimizer's state, none of which begins with @."""


class WeightCopies:
    """The copies that a plan asks for, placed like the parameters: a rank keeps those that it updates. Local.

    Args:
        plan: Its `ema` and `keep_best`.
        table: The model's tensors, placed, with the weights from which the run starts or resumes.
        axes: This rank's channels.

    Attributes:
        tensors: This rank's parts by entry and name. Of the best epoch there are none before the first one.
        best_row: The number of the best epoch; 0 before the first one.
    """

    def __init__(self, plan: Plan, table: ParamTable, axes: MeshChannels) -> None:
        self._table, self._decay = table, plan.ema
        self._monitor = Monitor.parse("keep_best", plan.keep_best) if plan.keep_best else None
        self._updated = [name for name in table.held(axes) if table.is_updated(name, axes)]
        self._buffers = [name for name in table.buffers if table.placement(name).held(axes)]
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.best_row = 0
        self._best_value = math.nan
        if self._decay is not None:
            # A step moves the average by a thousandth of the distance, which half precision rounds to nothing.
            self.tensors[EMA] = {name: _averaged(part).clone() for name, part in self._parts().items()}

    def _parts(self) -> dict[str, torch.Tensor]:
        return {name: detached(self._table.parameters[name]) for name in self._updated}

    def _parts_and_buffers(self) -> dict[str, torch.Tensor]:
        return self._parts() | {name: detached(self._table.buffers[name]) for name in self._buffers}

    @torch.no_grad()
    def end_update(self) -> None:
        """Move the average towards the weights, after an update of these."""
        if self._decay is not None and self._updated:
            averages, parts = self.tensors[EMA], self._parts()
            torch._foreach_lerp_(
                [averages[name] for name in parts], [_averaged(part) for part in parts.values()], 1 - self._decay
            )

    @torch.no_grad()
    def end_row(self, row: Mapping[str, Any]) -> None:
        """Keep the weights and buffers after an epoch, if it is the best one so far.

        Raises:
            TaskError: The history has no number of the monitored name, or a buffer cannot be kept.
        """
        if self._monitor is None:
            return
        value = self._monitor.value(row)
        if self.best_row and not self._monitor.improves(value, self._best_value):
            return
        self.best_row, self._best_value = int(row["epoch"]), value
        now = self._parts_and_buffers()
        best = self.tensors.setdefault(BEST, {name: torch.empty_like(values) for name, values in now.items()})
        for name, values in now.items():
            if best[name].shape != values.shape:
                raise TaskError(
                    f"keep_best cannot keep buffer {name}, which the model changes from shape {list(best[name].shape)} "
                    f"to {list(values.shape)}: leave keep_best out, and save the model in a checkpoint."
                )
            best[name].copy_(values)

    @torch.no_grad()
    def put_best(self) -> dict[str, torch.Tensor]:
        """Put the best epoch's buffers into the model; returns its parameters, by name, for the strategy to write."""
        best = self.tensors.get(BEST, {})
        for name in self._buffers if best else ():
            assign_(self._table.buffers[name], best[name])
        return {name: best[name] for name in self._updated if best}

    @torch.no_grad()
    def gather_average(self, axes: MeshChannels, *, keep: bool) -> dict[str, torch.Tensor]:
        """The whole moving average by parameter, on ranks with `keep`. **Collective** over the world.

        Call it before the parameters are gathered.
        """
        whole: dict[str, torch.Tensor] = {}
        for name, parameter in self._table.trainable.items() if self._decay is not None else ():
            placement, owner = self._table.placement(name), self._table.owners.get(name)
            part = self.tensors[EMA].get(name)
            if owner is not None:
                part = torch.empty_like(_averaged(detached(parameter))) if part is None else part
                axes.dp.broadcast_any_(part, owner)
            average = placement.gather(part, axes)
            if keep:
                whole[name] = placement.with_layout(average.to(placement.layout.dtype))
        return whole

    def of(self, name: str) -> dict[str, torch.Tensor]:
        """This rank's copies of one parameter or buffer, by entry."""
        return {entry: tensors[name] for entry, tensors in self.tensors.items() if name in tensors}

    def wanted(self, entry: str, name: str) -> bool:
        """Whether this rank has a copy of a parameter or buffer in an entry, as soon as there is one at all."""
        if entry == EMA:
            return self._decay is not None and name in self._updated
        return self._monitor is not None and (name in self._updated or name in self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """What is saved beside the tensors, as JSON-able data."""
        return {"monitor": str(self._monitor), "best_row": self.best_row, "best_value": self._best_value}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Continue with saved copies: those that are wanted here.

        Args:
            state: A `state_dict`; empty if none was saved.
            tensors: This rank's parts by entry and name; what is missing is as in the model.
        """
        if self._decay is not None:
            for name, values in tensors.get(EMA, {}).items():
                self.tensors[EMA][name].copy_(values)
        if self._monitor is not None and state.get("best_row") and state["monitor"] == str(self._monitor):
            self.best_row, self._best_value = state["best_row"], state["best_value"]
            self.tensors[BEST] = {
                name: torch.empty_like(values).copy_(tensors.get(BEST, {}).get(name, values))
                for name, values in self._parts_and_buffers().items()
            }


def _averaged(part: torch.Tensor) -> torch.Tensor:
    return part.float() if part.is_floating_point() and part.itemsize < 4 else part
