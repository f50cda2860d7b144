"""The extra states of a model on this rank of a mesh: saved, loaded, and gathered from the stages of a pipeline."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.params.extra_state import extra_states, set_extra_states, stateful_modules
from nbdist.core.params.tagged_json import from_json, to_json
from nbdist.errors import TaskError
from nbdist.plan import Plan

__all__ = ["ExtraStates", "check_extra_states", "merged"]


class ExtraStates:
    """What `get_extra_state` returns, in the course of a run.

    Every rank runs the whole model, except in a pipeline: there a module runs on the rank of one stage, whose state
    counts. It is the one that has changed since the start.

    Args:
        model: The model in its state at the start, or after what was resumed from was loaded.
        axes: This rank's channels.
    """

    def __init__(self, model: nn.Module, axes: MeshChannels) -> None:
        self._model = model
        self._axes = axes
        self._modules = stateful_modules(model)
        self._staged = axes.pp.size > 1
        self._at_first = {name: json.dumps(state) for name, state in self._states().items()} if self._staged else {}

    @property
    def any(self) -> bool:
        """Whether a module has extra state."""
        return bool(self._modules)

    def state_dict(self) -> dict[str, Any]:
        """What this rank saves, as JSON-able data. Local.

        Raises:
            TaskError: JSON cannot represent it.
        """
        states = self._states()
        changed = [name for name, state in states.items() if self._staged and json.dumps(state) != self._at_first[name]]
        return {"data": self._axes.data.rank, "states": states, "changed": changed}

    def whole(self) -> dict[str, Any]:
        """The states by module, in a pipeline those of all stages. **Collective** over ``pp``."""
        if not (self._staged and self._modules):
            return extra_states(self._model)
        own, channel = json.dumps(self.state_dict()).encode(), self._axes.pp
        saved = [json.loads(channel.broadcast_bytes(own, rank)) for rank in range(channel.size)]
        return merged(saved, self._axes.data.rank)

    def gather(self) -> None:
        """Give all ranks of a pipeline the states of all stages. **Collective** over ``pp``."""
        if self._staged and self._modules:
            set_extra_states(self._model, self.whole())

    def _states(self) -> dict[str, Any]:
        return {
            name: to_json(module.get_extra_state(), f"the extra state of {name or 'the model'}")
            for name, module in self._modules.items()
        }


def merged(saved: list[dict[str, Any]], data_rank: int) -> dict[str, Any]:
    """The extra states of one replica, from what ranks have saved: of each module that of the rank which changed it.

    Args:
        saved: The `ExtraStates.state_dict` of each rank.
        data_rank: The replica's coordinate.

    Raises:
        ValueError: Nothing that `ExtraStates` has saved.
    """
    own = [one for one in saved if one["data"] == data_rank]
    states: dict[str, Any] = {}
    for one in reversed(own):
        states.update(one["states"])
    for one in own:
        states.update({name: one["states"][name] for name in one["changed"]})
    return {name: from_json(state) for name, state in states.items()}


def check_extra_states(model: nn.Module, plan: Plan) -> None:
    """Check that extra state can be saved where a plan needs it: for checkpoints, in a pipeline. Local.

    Raises:
        TaskError: It cannot, or the best epoch's is needed, of which weights and buffers alone are kept.
    """
    if plan.keep_best and (names := stateful_modules(model)):
        raise TaskError(
            f"keep_best keeps weights and buffers, but {min(names) or 'the model'} has state beside them "
            "(get_extra_state): leave keep_best out, and take the best epoch's checkpoint (--checkpoint)."
        )
    if plan.checkpoint or plan.mesh.pp > 1:
        for name, state in extra_states(model).items():
            to_json(state, f"the extra state of {name or 'the model'}")
