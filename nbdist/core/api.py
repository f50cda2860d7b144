"""`nbdist.train`: trains a model from a script, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from nbdist.core.comm.world import World
from nbdist.core.console import console_sink
from nbdist.core.params.gather import check_whole
from nbdist.core.state.checkpoint_writer import check_resume
from nbdist.core.task.task import Step, Task
from nbdist.core.train import Result, fit
from nbdist.errors import PlanError
from nbdist.plan import Plan, available_cores
from nbdist.telemetry import JsonlSink, Sink, TextSink
from nbdist.telemetry.record import new_run_id, record_path

__all__ = ["train"]


def train(
    model: Any,
    data: Any,
    *,
    loss: Any = None,
    step: Step | None = None,
    optimizer: Any = "adamw",
    lr: float | None = None,
    lr_scheduler: Any = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    clip_norm: float | None = None,
    val: Any = None,
    metric: Any = None,
    shuffle: bool | None = None,
    seed: int | None = None,
    threads: int | None = None,
    strategy: str | None = None,
    precision: str | None = None,
    sync_batchnorm: bool | None = None,
    reproducible: int | bool | None = None,
    microbatches: int | None = None,
    schedule: str | None = None,
    split_at: Sequence[str] | None = None,
    tensor_plan: Mapping[str, str] | None = None,
    gather: bool | None = None,
    checkpoint: str | None = None,
    checkpoint_every: int | str | None = None,
    checkpoint_keep: int | None = None,
    resume: str | bool | None = None,
    stop_on_nan: bool | None = None,
    tensorboard: str | None = None,
    bucket_mib: float | None = None,
    device: str = "auto",
    record: bool = True,
    verbose: bool = True,
) -> Result:
    """Train `model` on all ranks of torchrun, or of an initialised process group; else in this process alone.

    **Collective** under torchrun: every rank calls it with the same arguments. Started with plain ``python``, the
    process is the only rank. Before the first step, rank 0's weights and buffers are sent to all ranks; when it
    returns, every rank's `model` holds the trained ones, whatever the mesh.

    Args:
        model: An ``nn.Module``.
        data: A Dataset, a DataLoader (its batch size is the global one), or a tuple of tensors or NumPy arrays.
        loss: A name such as "cross_entropy", or ``loss(output, target)``: a mean, or ``(mean, weight)``.
        step: In place of `loss`: ``step(model, batch)``, a mean loss, or ``(mean, weight)``.
        optimizer: A name such as "adamw", a callable that takes the parameters, or an optimizer of `model`.
        lr: Learning rate; by default the optimizer's own.
        lr_scheduler: A callable that makes a torch scheduler from an optimizer; it steps with the optimizer, or, for
            ReduceLROnPlateau, after each epoch.
        epochs: Passes over the data; 1 unless `steps`.
        steps: Optimizer steps in place of epochs, wrapping round the data.
        batch_size: Global: samples in one optimizer step, over all ranks. 32 by default.
        accumulate: Microbatches that each rank runs in one step.
        clip_norm: Largest global L2 norm of the gradient.
        val: Validation data.
        metric: A name such as "accuracy", or ``metric(output, target)``, measured on `val`.
        shuffle: Whether to read in a new order each epoch; yes by default.
        seed: Decides the order of samples and the random numbers.
        threads: CPU threads of each rank; cores / ranks by default.
        strategy: "data", "shard", "pipeline", "tensor", or a mesh such as "dp=2,pp=2".
        precision: "full", "bf16" or "fp16": what forward and loss compute in.
        sync_batchnorm: Whether BatchNorm sees the whole microbatch of all replicas.
        reproducible: Whether the bits must not depend on the number of ranks; True, or the number of slices into which
            each batch is cut for that (12). For the strategy data; `threads` is 1 then, unless given.
        microbatches: Microbatches in flight through a pipeline, for each one of `accumulate`.
        schedule: Pipeline schedule: "1f1b" by default, "gpipe" or "interleaved".
        split_at: Names of the modules that begin a stage of a pipeline; by default it is cut by measured time.
        tensor_plan: How tensor parallelism splits layers: names or patterns to "column", "row", ...; by default
            planned automatically.
        gather: Whether every rank's model ends with all weights; if not, see `nbdist.gather`, or `checkpoint`.
        checkpoint: Folder for checkpoints: one at the end, and in between with `checkpoint_every`.
        checkpoint_every: How often, in steps (200) or time ("90s", "5min").
        checkpoint_keep: How many of the newest stay; 3 by default.
        resume: Folder of a checkpoint to resume from, saved on any mesh, up to a total of `epochs` or `steps`; True
            for the newest one in `checkpoint`, if any: a script that torchrun restarts then continues.
        stop_on_nan: Whether to end with an error when a loss is not finite, before it reaches the weights.
        tensorboard: Folder for TensorBoard, in which the run gets its own.
        bucket_mib: Gradient bucket in MiB, where the sync overlaps with backward.
        device: "auto", "cpu" or "cuda".
        record: Whether to keep a record of the run: one file per rank, one JSON line per event.
        verbose: Whether rank 0 shows progress on standard error: in a terminal all ranks, live; else an occasional
            line.

    Returns:
        The state, the history (one dict an epoch) and the plan.

    Raises:
        PlanError: An option is invalid, or impossible here.
        TaskError: The model, the data or another argument cannot be used.
    """
    task = Task.create(
        model, data, loss=loss, step=step, optimizer=optimizer, lr=lr, lr_scheduler=lr_scheduler, val=val,
        metric=metric, batch_size=batch_size, shuffle=shuffle,
    )  # fmt: skip
    options: dict[str, Any] = {
        "epochs": epochs, "steps": steps, "accumulate": accumulate, "clip_norm": clip_norm, "seed": seed,
        "threads": threads, "strategy": strategy, "precision": precision, "sync_batchnorm": sync_batchnorm,
        "microbatches": microbatches, "schedule": schedule, "split_at": split_at, "tensor_plan": tensor_plan,
        "gather": gather, "checkpoint": checkpoint, "checkpoint_every": checkpoint_every,
        "checkpoint_keep": checkpoint_keep, "resume": resume, "stop_on_nan": stop_on_nan, "bucket_mib": bucket_mib,
        "tensorboard": tensorboard, "reproducible": reproducible,
    }  # fmt: skip
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    plan = Plan.create(ranks=size, cores=_cores(size), **options, **task.options)
    check_whole(model)
    if plan.resume:
        check_resume(plan, model, task.optimizer)
    with World.from_environment(device) as world, contextlib.ExitStack() as cleanup:
        run_id, live = _agree(plan, world, verbose and sys.stderr.isatty())
        sinks: list[Sink] = []
        if record:
            sinks.append(JsonlSink(record_path(run_id, world.rank)))
        if verbose and live:
            sinks.append(console_sink(world, run_id))
        elif verbose and world.rank == 0:
            sinks.append(TextSink())
        for sink in sinks:
            cleanup.callback(sink.close)
        return fit(task, plan, world, run_id=run_id, sinks=sinks)


def _cores(size: int) -> int:
    """Cores of all hosts, assuming equal hosts."""
    return available_cores() * size // int(os.environ.get("LOCAL_WORLD_SIZE", size))


def _agree(plan: Plan, world: World, live: bool) -> tuple[str, bool]:
    """Check that all ranks have rank 0's plan; returns rank 0's run id and `live`. **Collective**."""
    agreed = world.channel().broadcast_bytes(json.dumps([new_run_id(), live, plan.to_dict()]).encode())
    run_id, live, plan_of_zero = json.loads(agreed)
    own = json.loads(json.dumps(plan.to_dict()))
    differing = [name for name in own if own[name] != plan_of_zero[name]]
    if differing:
        name = differing[0]
        raise PlanError(
            f"rank {world.rank} was given {name}={own[name]}, rank 0 {plan_of_zero[name]}: all ranks need the same."
        )
    return str(run_id), live
