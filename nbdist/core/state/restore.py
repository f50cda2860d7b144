"""What was kept, put back: into a model and its optimizer on any mesh, and into a training that goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.optim.attributes import put_attributes
from nbdist.core.optim.references import TensorReferences, is_name
from nbdist.core.optim.state import device_of_entry, is_split
from nbdist.core.params.table import ParamTable
from nbdist.core.state.checkpoint_reader import CheckpointReader, candidates
from nbdist.core.state.progress import TrainProgress
from nbdist.core.state.shard_plan import from_all
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh, Plan

__all__ = ["ORDER", "check_goes_on", "check_same", "load", "load_whole", "opened_by_all", "position_of", "same_mesh"]

ORDER = ("batch_size", "seed", "shuffle")
"""The options that decide which samples a batch holds."""


def opened_by_all(folder: str, world: World) -> CheckpointReader:
    """The newest checkpoint in a folder that is whole, on all ranks the same one. **Collective**.

    Rank 0 names it, by what its files have to be; the ranks of a host share the reading that shows that they are.

    Args:
        folder: Of checkpoints, or of one; rank 0's counts.
        world: Of the ranks.

    Raises:
        PlanError: There is none, or another rank has not the same one.
    """
    channel, rank = world.channel(), world.rank
    named, problem = [], ""
    if rank == 0:
        try:
            named = [str(place) for place in candidates(folder)]
        except PlanError as error:
            problem = str(error)
    named, problem = json.loads(channel.broadcast_bytes(json.dumps([named, problem]).encode()))
    for place in named:
        saved, seal, problem = None, "", ""
        try:
            saved = CheckpointReader.of(Path(place))
            seal = saved.seal
            saved.hash_files(world.local_rank, world.local_size)
        except PlanError as error:
            problem = str(error)
        told = [json.loads(text) for text in from_all(json.dumps([seal, problem]), channel)]
        first = told[0][0]  # empty where rank 0 itself cannot read it
        for other, (seen, trouble) in enumerate(told) if first else ():
            if seen != first:
                raise PlanError(
                    f"rank 0 goes on from {place!r}, of which rank {other} does not see the same files "
                    f"({trouble or 'it has another checkpoint there'}): let all ranks see one folder, or give each "
                    "host a copy of this checkpoint."
                )
        problem = next((trouble for _, trouble in told if trouble), "")
        if saved is not None and not problem:
            return saved
        if rank == 0 and place != named[-1]:
            warnings.warn(f"{problem} The one before it is taken.", stacklevel=2)
    raise PlanError(problem)


def load(
    saved: CheckpointReader, table: ParamTable, optimizer: torch.optim.Optimizer | None, axes: MeshChannels
) -> None:
    """Put weights, buffers and the optimizer's state back, whatever mesh either is on. Local.

    Args:
        saved: What was kept.
        table: The model's tensors, placed.
        optimizer: Over its parameters; None to leave its state be.
        axes: This rank's channels.

    Raises:
        TaskError: It is another model's or another optimizer's; nothing has been changed.
    """
    check_same(saved, table, optimizer)
    names = saved.names
    data_rank = axes.data.rank if axes.world.size > 1 and same_mesh(saved, axes) else None
    with torch.no_grad():
        for name, tensor in table.tensors.items():
            placement = table.placement(name)
            if not (name in names and placement.held(axes)):
                continue
            if name in table.buffers:
                tensor.copy_(saved.buffer(name, data_rank))
            elif table.is_updated(name, axes) or not table.parameters[name].requires_grad:
                tensor.copy_(placement.piece(saved.whole(name).to(tensor.device), axes))
        if optimizer is not None:
            references = TensorReferences(table.objects)
            _load_settings(saved, optimizer, references)
            put_attributes(optimizer, saved.attributes, references)
            for name in table.parameters:
                if name in names:
                    _load_state(saved, name, table, optimizer, axes)


def load_whole(saved: CheckpointReader, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """`load` into an ordinary model, in place. Local."""
    load(saved, ParamTable.of(model), optimizer, MeshChannels(World(), Mesh()))


def check_same(saved: CheckpointReader, table: ParamTable, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `TaskError` where what was kept is another model's or another optimizer's. Local."""
    shapes = {name: list(table.placement(name).layout.shape) for name in table.tensors}
    for name in {**shapes, **saved.tensors}:
        there, here = saved.tensors.get(name, {}).get("shape"), shapes.get(name)
        if there != here:
            what = "is not in it" if there is None else "is only in it" if here is None else f"has shape {there} in it"
            raise TaskError(
                f"checkpoint {saved.name} is another model's: {name}{'' if here is None else f' {here}'} {what}; "
                "make the model as it was."
            )
    for name in table.parameters if saved.complete else ():
        if not saved.holds(name):
            raise TaskError(f"checkpoint {saved.name} is not whole: the values of {name} are not in it.")
    if optimizer is None:
        return
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    mine = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if mine != [group["params"] for group in saved.groups]:
        raise TaskError(
            f"checkpoint {saved.name} has other parameter groups than the optimizer: build it as it was, over the "
            "same parameters in the same order."
        )
    for group, told in zip(optimizer.param_groups, saved.groups, strict=True):
        for key in {*group} & {*told} - {"params"}:
            if not _alike(group[key], told[key]):
                raise TaskError(
                    f"checkpoint {saved.name} has {key}={told[key]!r}, where the optimizer has {key}={group[key]!r}: "
                    "build it as it was."
                )


def _alike(fresh: Any, told: Any) -> bool:
    """Whether a setting of an optimizer may become what was told: what begins as None may be anything."""
    if isinstance(fresh, torch.Tensor) and is_name(told):
        return True
    if isinstance(fresh, tuple):
        return isinstance(told, list) and len(fresh) == len(told) and all(map(_alike, fresh, told))
    if isinstance(fresh, (int, float, torch.Tensor)) and not isinstance(fresh, bool):
        return isinstance(told, (int, float)) and not isinstance(told, bool)
    if isinstance(fresh, bool):
        return told is None or isinstance(told, bool)
    return fresh is None or isinstance(told, type(fresh))


def check_goes_on(saved: CheckpointReader, plan: Plan) -> None:
    """Raise `PlanError` where `plan` cannot go on from there. Local."""
    told = saved.ranks[0]
    position = told["position"]
    if position["batch"]:
        for name in ORDER:
            if told["plan"][name] != getattr(plan, name):
                raise PlanError(
                    f"checkpoint {saved.name} stands in the middle of epoch {position['epoch']} of a run with "
                    f"{name}={told['plan'][name]}, but {name}={getattr(plan, name)} is asked for: give the same, or a "
                    "checkpoint from the end of an epoch."
                )
    if TrainProgress.of(position, torch.device("cpu")).complete(plan):
        done, word = (position["step"], "steps") if plan.steps is not None else (position["epoch"] - 1, "epochs")
        raise PlanError(
            f"checkpoint {saved.name} has done {done} {word} already: ask for more than that in all "
            f"(--{word} {done + 1})."
        )


def same_mesh(saved: CheckpointReader, axes: MeshChannels) -> bool:
    """Whether each rank takes the place of the one that kept it: as many may be laid out otherwise. Local."""
    return len(saved.ranks) == axes.world.size and bool(saved.ranks[0]["mesh"] == str(axes.mesh))


def position_of(saved: CheckpointReader, axes: MeshChannels, device: torch.device) -> TrainProgress:
    """Where this rank goes on; on other ranks than it was kept by, rank 0 counts for all that were. Local."""
    ranks, world = saved.ranks, axes.world
    if same_mesh(saved, axes):
        return TrainProgress.of(ranks[world.rank]["position"], device)
    told: dict[str, Any] = dict(ranks[0]["position"])
    speaking = [rank["position"] for rank in ranks if rank["reports_loss"]]
    first = world.rank == 0 or (axes.reports_loss and axes.data.rank == 0)
    told["samples"] = sum(position["samples"] for position in speaking) if first else 0
    told["row"] = {
        **told["row"],
        "samples": sum(position["row"]["samples"] for position in speaking) if first and axes.reports_loss else 0,
        "loss": [sum(p["row"]["loss"][i] for p in speaking) if first and axes.reports_loss else 0.0 for i in range(2)],
    }
    return TrainProgress.of(told, device)


def _load_settings(saved: CheckpointReader, optimizer: torch.optim.Optimizer, references: TensorReferences) -> None:
    for group, values in zip(optimizer.param_groups, saved.groups, strict=True):
        for key, value in values.items():
            if key == "params" or key not in group:
                continue
            if isinstance(group[key], torch.Tensor) and not is_name(value):
                group[key].fill_(value)
            else:
                group[key] = references.from_json(group[key], value)


def _load_state(
    saved: CheckpointReader, name: str, table: ParamTable, optimizer: torch.optim.Optimizer, axes: MeshChannels
) -> None:
    parameter, placement = table.parameters[name], table.placement(name)
    optimizer.state.pop(parameter, None)
    if not (placement.held(axes) and table.is_updated(name, axes)):
        return
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    state: dict[str, Any] = dict(saved.values.get(name, {}))
    for entry in saved.entries(name):
        whole = saved.whole(name, entry)
        if is_split(entry, whole, placement.layout.shape):
            piece = placement.piece(whole.to(parameter.device), axes)
            dtype = parameter.dtype if whole.dtype == saved.dtype(name) else whole.dtype
            state[entry] = torch.empty_like(parameter, dtype=dtype).copy_(piece)
        else:  # not the file's memory, which would keep it mapped
            state[entry] = whole.to(device_of_entry(entry, group, parameter.device), copy=True)
    if state:
        optimizer.state[parameter] = state
