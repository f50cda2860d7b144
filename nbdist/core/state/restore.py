"""Restore: load a checkpoint or snapshot into a model and optimizer on any mesh, or into a resumed training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.optim.optimizer_attributes import load_attributes
from nbdist.core.optim.state import device_of_entry, is_split
from nbdist.core.optim.tensor_references import TensorReferences, is_name
from nbdist.core.params.extra_state import set_extra_states, stateful_modules
from nbdist.core.params.made_buffers import adopt_buffers
from nbdist.core.params.param_table import ParamTable, assign_
from nbdist.core.params.weight_copies import BEST, COPIES, WeightCopies
from nbdist.core.state.checkpoint_reader import CheckpointReader, candidates
from nbdist.core.state.shard_plan import bit_sum, gather_texts
from nbdist.core.state.train_progress import TrainProgress
from nbdist.core.task.carried_state import CarriedState, check_carried
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Mesh, Plan

__all__ = [
    "SAMPLE_ORDER_OPTIONS",
    "check_can_resume",
    "check_same",
    "load",
    "load_best",
    "load_carried",
    "load_copies",
    "load_whole",
    "open_on_all_ranks",
    "progress_of",
    "same_mesh",
]

SAMPLE_ORDER_OPTIONS = ("batch_size", "seed", "shuffle")
"""The options that decide which samples are in a batch."""


def open_on_all_ranks(folder: str, world: World) -> CheckpointReader:
    """Open the newest undamaged checkpoint in a folder, the same one on all ranks. **Collective**.

    Rank 0 chooses it and broadcasts its checksum; the ranks of a host share the work of hashing its files.

    Args:
        folder: Of checkpoints, or of one; rank 0's is used.
        world: The ranks.

    Raises:
        PlanError: There is none, or another rank does not see the same one.
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
        opened = [json.loads(text) for text in gather_texts(json.dumps([seal, problem]), channel)]
        expected = opened[0][0]  # empty if rank 0 itself cannot read it
        for other, (seen, trouble) in enumerate(opened) if expected else ():
            if seen != expected:
                raise PlanError(
                    f"rank 0 resumes from {place!r}, of which rank {other} does not see the same files "
                    f"({trouble or 'it has another checkpoint there'}): use a folder that all ranks share, or give "
                    "each host a copy of this checkpoint."
                )
        problem = next((trouble for _, trouble in opened if trouble), "")
        if saved is not None and not problem:
            return saved
        if rank == 0 and place != named[-1]:
            warnings.warn(f"{problem} The one before it is taken.", stacklevel=2)
    raise PlanError(problem)


def load(
    saved: CheckpointReader, model: nn.Module, table: ParamTable, optimizers: Mapping[str, torch.optim.Optimizer],
    axes: MeshChannels,
) -> None:  # fmt: skip
    """Load weights, buffers, the modules' extra state and the optimizers' state, from any mesh onto any mesh. Local.

    Args:
        saved: The checkpoint or snapshot.
        model: The model.
        table: Its tensors, placed.
        optimizers: Over its parameters, by name; none to load weights and buffers only.
        axes: This rank's channels.

    Raises:
        TaskError: It is of another model or other optimizers; nothing has been changed.
    """
    check_same(saved, table, optimizers)
    names = saved.names
    data_rank = axes.data.rank if axes.world.size > 1 and same_mesh(saved, axes) else None
    states = saved.extra_states(data_rank)
    unknown = states.keys() - stateful_modules(model).keys()
    if unknown:
        raise TaskError(
            f"{saved.name} is of another model: the extra state of {min(unknown) or 'the model'} is only in "
            "it; build the model as it was."
        )
    set_extra_states(model, states)
    made = {name: about["persistent"] for name, about in saved.made.items() if name in saved.names}
    adopt_buffers(model, {name: saved.buffer(name, data_rank) for name in made}, made, all_named=False)
    with torch.no_grad():
        for name, tensor in table.tensors.items():
            placement = table.placement(name)
            if not (name in names and placement.held(axes)) or name in made:
                continue
            if name in table.buffers:
                assign_(table.buffers[name], saved.buffer(name, data_rank))
            elif table.is_updated(name, axes) or not table.parameters[name].requires_grad:
                tensor.copy_(placement.part(saved.whole(name).to(tensor.device), axes))
        references = TensorReferences(table.objects)
        for key, optimizer in optimizers.items():
            settings = saved.optimizers[key]
            _load_settings(settings["groups"], optimizer, references)
            load_attributes(optimizer, settings["attributes"], references)
            for group, saved_group in zip(optimizer.param_groups, settings["groups"], strict=True):
                for name in saved_group["params"]:
                    if name in names:
                        _load_state(saved, name, table, optimizer, group, axes)


def load_copies(saved: CheckpointReader, copies: WeightCopies, table: ParamTable, axes: MeshChannels) -> None:
    """Load the copies of the weights that were saved, from any mesh onto any mesh. Local."""
    tensors = {
        entry: {
            name: table.placement(name).part(saved.whole(name, entry).to(axes.world.device), axes)
            for name in saved.copies(entry)
            if copies.wanted(entry, name)
        }
        for entry in COPIES
    }
    copies.load_state_dict(saved.copies_state, tensors)


def load_carried(saved: CheckpointReader, carried: CarriedState, plan: Plan, device: torch.device) -> None:
    """Load what the slices carried from batch to batch, from any mesh with as many slices. Local.

    Raises:
        PlanError: The batches of the run have another number of slices.
    """
    states = saved.carried_states
    check_carried(saved.name, states, plan.slices)
    carried.load(states, device)


def load_best(saved: CheckpointReader, model: nn.Module) -> None:
    """Load the weights and buffers of the best epoch into an ordinary model, if they were saved. Local."""
    objects = ParamTable.of(model).objects
    for name in saved.copies(BEST):
        assign_(objects[name], saved.whole(name, BEST))


def load_whole(
    saved: CheckpointReader, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer] | None = None
) -> None:
    """`load` into an ordinary model, in place. Local."""
    load(saved, model, ParamTable.of(model), optimizers or {}, MeshChannels(World(), Mesh()))


def check_same(saved: CheckpointReader, table: ParamTable, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    """Raise `TaskError` if the saved state is of another model or other optimizers. Local."""
    shapes = {name: list(table.placement(name).layout.shape) for name in table.tensors}
    for name in [name for name in {**shapes, **saved.tensors} if name not in saved.made]:
        saved_shape, own_shape = saved.tensors.get(name, {}).get("shape"), shapes.get(name)
        if saved_shape != own_shape:
            what = (
                "is not in it"
                if saved_shape is None
                else "is only in it"
                if own_shape is None
                else f"has shape {saved_shape} in it"
            )
            own = "" if own_shape is None else f" {own_shape}"
            raise TaskError(f"{saved.name} is of another model: {name}{own} {what}; build the model as it was.")
    for name, total in saved.left_out.items():
        parameter = table.parameters.get(name)
        if parameter is not None and table.placement(name).whole and bit_sum(parameter) != total:
            raise TaskError(
                f"{saved.name} leaves out {name}, which is not trained, and the model has other values of it than when "
                "it was saved: load the same ones into the model first."
            )
    for name in table.parameters if saved.complete else ():
        if not saved.holds(name):
            raise TaskError(f"{saved.name} is not whole: the values of {name} are not in it.")
    if optimizers and optimizers.keys() != saved.optimizers.keys():
        raise TaskError(
            f"{saved.name} is of {_listed(saved.optimizers)}, not of {_listed(optimizers)}: give "
            "optimizers of the same names."
        )
    names = {id(parameter): name for name, parameter in table.parameters.items()}
    for key, optimizer in optimizers.items():
        _check_groups(saved.name, saved.optimizers[key]["groups"], optimizer, names)


def _listed(optimizers: Mapping[str, Any]) -> str:
    return "one optimizer" if [*optimizers] == [""] else f"the optimizers {', '.join(optimizers)}"


def _check_groups(
    of: str, groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer, names: dict[int, str]
) -> None:
    own_groups = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if own_groups != [group["params"] for group in groups]:
        raise TaskError(
            f"{of} has other parameter groups than the optimizer: build the optimizer as it was, "
            "over the same parameters in the same order."
        )
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        for key in {*group} & {*saved_group} - {"params"}:
            if not _is_compatible(group[key], saved_group[key]):
                raise TaskError(
                    f"{of} has {key}={saved_group[key]!r}, where the optimizer has "
                    f"{key}={group[key]!r}: build the optimizer as it was."
                )


def _is_compatible(fresh: Any, saved: Any) -> bool:
    """Whether an optimizer's setting may take the saved value: a fresh None may take anything."""
    if isinstance(fresh, torch.Tensor) and is_name(saved):
        return True
    if isinstance(fresh, tuple):
        return isinstance(saved, list) and len(fresh) == len(saved) and all(map(_is_compatible, fresh, saved))
    if isinstance(fresh, (int, float, torch.Tensor)) and not isinstance(fresh, bool):
        return isinstance(saved, (int, float)) and not isinstance(saved, bool)
    if isinstance(fresh, bool):
        return saved is None or isinstance(saved, bool)
    return fresh is None or isinstance(saved, type(fresh))


def check_can_resume(saved: CheckpointReader, plan: Plan) -> None:
    """Raise `PlanError` if a run of `plan` cannot resume from it. Local."""
    first = saved.ranks[0]
    position = first["position"]
    check_carried(saved.name, saved.carried_states, plan.slices)
    if position["batch"]:
        for name in SAMPLE_ORDER_OPTIONS:
            if first["plan"][name] != getattr(plan, name):
                raise PlanError(
                    f"{saved.name} is from the middle of epoch {position['epoch']} of a run with "
                    f"{name}={first['plan'][name]}, but {name}={getattr(plan, name)} is given: give the same, or a "
                    "checkpoint from the end of an epoch."
                )
    progress = TrainProgress.from_state_dict(position, torch.device("cpu"))
    if progress.complete(plan) or progress.beyond(plan):
        done, word = (position["step"], "steps") if plan.steps is not None else (position["epoch"] - 1, "epochs")
        passed = f"{done} {word if done != 1 else word[:-1]}"
        raise PlanError(f"{saved.name} was saved after {passed}: give a larger total (--{word} {done + 1}).")


def same_mesh(saved: CheckpointReader, axes: MeshChannels) -> bool:
    """Whether it was saved on the same mesh, so that each rank resumes its own progress. Local."""
    return len(saved.ranks) == axes.world.size and bool(saved.ranks[0]["mesh"] == str(axes.mesh))


def progress_of(saved: CheckpointReader, axes: MeshChannels, device: torch.device) -> TrainProgress:
    """The progress to resume with; on another mesh, rank 0 takes over all ranks' counts. Local."""
    ranks, world = saved.ranks, axes.world
    if same_mesh(saved, axes):
        return TrainProgress.from_state_dict(ranks[world.rank]["position"], device)
    position: dict[str, Any] = dict(ranks[0]["position"])
    reporting = [rank["position"] for rank in ranks if rank["reports_loss"]]
    first = world.rank == 0 or (axes.reports_loss and axes.data.rank == 0)
    position["samples"] = sum(p["samples"] for p in reporting) if first else 0
    position["row"] = {
        **position["row"],
        "samples": sum(p["row"]["samples"] for p in reporting) if first and axes.reports_loss else 0,
        "loss": [sum(p["row"]["loss"][i] for p in reporting) if first and axes.reports_loss else 0.0 for i in range(2)],
    }
    return TrainProgress.from_state_dict(position, device)


def _load_settings(
    groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer, references: TensorReferences
) -> None:
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key, value in values.items():
            if key == "params" or key not in group:
                continue
            if isinstance(group[key], torch.Tensor) and not is_name(value):
                group[key].fill_(value)
            else:
                group[key] = references.from_json(group[key], value)


def _load_state(
    saved: CheckpointReader, name: str, table: ParamTable, optimizer: torch.optim.Optimizer, group: dict[str, Any],
    axes: MeshChannels,
) -> None:  # fmt: skip
    parameter, placement = table.parameters[name], table.placement(name)
    optimizer.state.pop(parameter, None)
    if not (placement.held(axes) and table.is_updated(name, axes)):
        return
    state: dict[str, Any] = dict(saved.values.get(name, {}))
    for entry in saved.entries(name):
        whole = saved.whole(name, entry)
        if is_split(entry, whole, placement.layout.shape):
            piece = placement.part(whole.to(parameter.device), axes)
            dtype = parameter.dtype if whole.dtype == saved.dtype(name) else whole.dtype
            state[entry] = torch.empty_like(parameter, dtype=dtype).copy_(piece)
        else:  # a copy, or the state would keep the file mapped
            state[entry] = whole.to(device_of_entry(entry, group, parameter.device), copy=True)
    if state:
        optimizer.state[parameter] = state
