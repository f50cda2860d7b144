"""Combinations of options that no run can have: each is one sentence with the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdist.errors import PlanError
from nbdist.plan.early_stop import EarlyStop
from nbdist.plan.monitor import Monitor

if TYPE_CHECKING:
    from nbdist.plan.plan import Plan

__all__ = ["check_combinations"]


def check_combinations(plan: Plan) -> None:
    """Check options against each other and the mesh, once each has been checked by itself.

    Raises:
        PlanError: They exclude each other, or one needs another.
    """
    if plan.schedule_by != "step" and not plan.lr_scheduler:
        raise PlanError(f"schedule_by={plan.schedule_by} is for an lr_scheduler, and none is given: leave it out.")
    if plan.reproducible:
        _check_reproducible(plan)
    _check_axes(plan)
    _check_epochs(plan)
    if plan.ema is not None and plan.ema >= 1:
        raise PlanError(f"ema={plan.ema} would keep the first weights: give a decay below 1, such as 0.999.")
    if plan.after_step and plan.mesh.size > plan.mesh.dp:
        raise PlanError(
            f"after_step={plan.after_step} sees the whole model, and mesh {plan.mesh} cuts it: use --strategy data."
        )
    if plan.updates:
        _check_updates(plan)
    if plan.carries and plan.mesh.pp > 1:
        raise PlanError(
            f"the step carries values from batch to batch, and mesh {plan.mesh} has no rank that runs the whole step: "
            "use --strategy data, shard or tensor."
        )
    if plan.each_epoch and not plan.gather:
        raise PlanError(
            f"each_epoch={plan.each_epoch} gets the whole model, and gather is off: leave one of the two out."
        )
    if plan.checkpoint_every:
        if not plan.checkpoint:
            raise PlanError(
                f"checkpoint_every={plan.checkpoint_every} needs a folder: name one with checkpoint (--checkpoint DIR)."
            )
        plan.checkpoint_cadence  # noqa: B018 - it is checked
    if plan.batch_size < plan.slices:
        ranks, each = plan.mesh.data, plan.slices_per_rank
        how = f"{ranks} rank{'s' if ranks > 1 else ''} x {each} microbatch{'es' if each > 1 else ''}"
        what = "ranks"
        if plan.reproducible:
            how, what = f"reproducible={plan.reproducible}", "slices"
        raise PlanError(
            f"batch_size {plan.batch_size} is smaller than its {plan.slices} slices "
            f"({how}): use {plan.slices} or more, or fewer {what}."
        )


def _check_reproducible(plan: Plan) -> None:
    """Refuse what would make bits depend on the number of ranks."""
    if plan.mesh.size > plan.mesh.dp:
        raise PlanError(
            f"reproducible needs ranks that each hold the whole model, and mesh {plan.mesh} cuts it: "
            "use --strategy data."
        )
    if plan.accumulate > 1 or plan.sync_batchnorm:
        name = "accumulate" if plan.accumulate > 1 else "sync_batchnorm"
        raise PlanError(f"{name} depends on the number of ranks, so reproducible excludes it: leave one out.")
    if plan.mesh.size > plan.reproducible:
        raise PlanError(
            f"reproducible cuts a batch into {plan.reproducible} slices, too few for {plan.mesh.size} ranks: "
            f"use --reproducible {plan.mesh.size} or fewer ranks."
        )


def _check_updates(plan: Plan) -> None:
    """Refuse what a step that updates in its midst cannot have: slices one after another, or a part of the model."""
    why = "the step updates with nbdist.update"
    if plan.mesh.tp * plan.mesh.pp > 1:
        raise PlanError(f"{why}, and mesh {plan.mesh} cuts layers or the model: use --strategy data or shard.")
    for name, without in (("accumulate", 1), ("reproducible", 0)):
        if getattr(plan, name) > without:
            raise PlanError(
                f"{why}, so each rank computes one slice of a batch, and {name}={getattr(plan, name)} makes several: "
                "leave it out."
            )
    if plan.precision == "fp16":
        raise PlanError(f"{why}, and fp16 scales the loss of a whole step: use bf16.")
    if plan.reduction != "mean":
        raise PlanError(f"{why}, and reduction={plan.reduction} is for one loss: give it means.")


def _check_axes(plan: Plan) -> None:
    """Refuse options of an axis that the mesh does not have."""
    for name, axis, word in (("microbatches", "pp", "pipeline"), ("split_at", "pp", "pipeline"),
                             ("tensor_plan", "tp", "tensor")):  # fmt: skip
        if getattr(plan, name) and getattr(plan.mesh, axis) == 1:
            cure = " (accumulate cuts a batch on any mesh)" if name == "microbatches" else ""
            raise PlanError(f"{name} is given, but mesh {plan.mesh} has no {axis}: use --strategy {word}{cure}.")
    if plan.split_at and len(plan.split_at) != plan.stages - 1:
        raise PlanError(
            f"split_at names {len(plan.split_at)} modules, but {plan.stages} stages have {plan.stages - 1} "
            f"cuts between them: give {plan.stages - 1} names."
        )
    if plan.tensor_plan is not None and not isinstance(plan.tensor_plan, dict):
        raise PlanError(f"tensor_plan must be a dict of layer names and kinds, not {plan.tensor_plan!r}.")


def _check_epochs(plan: Plan) -> None:
    """Refuse what compares epochs, where there are none or a number has no direction."""
    if plan.early_stop:
        EarlyStop.parse(plan.early_stop)
    if plan.keep_best:
        Monitor.parse("keep_best", plan.keep_best)
    for name in ("early_stop", "keep_best", "each_epoch"):
        if getattr(plan, name) and plan.steps is not None:
            raise PlanError(f"{name}={getattr(plan, name)} looks at epochs, and steps={plan.steps}: give epochs.")
