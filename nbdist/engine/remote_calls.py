"""Remote calls: the functions that the kernel calls on an engine, by name through `trampoline`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from IPython import get_ipython

from nbdist.core.comm.rendezvous import connect_store
from nbdist.core.comm.world import World
from nbdist.core.control.command_log import CommandLog
from nbdist.core.evaluation.sample_gather import gathering_rank
from nbdist.core.optim.lr_schedulers import ready_states
from nbdist.core.optim.trained_optimizer import TrainedOptimizer
from nbdist.core.params.extra_state import extra_states
from nbdist.core.params.made_buffers import persistence
from nbdist.core.params.param_table import ParamTable
from nbdist.core.predict import predict
from nbdist.core.process.memory import free_frames, free_unused_memory
from nbdist.core.rehearsal import rehearse
from nbdist.core.result import Result
from nbdist.core.task.built_model import move_to_file
from nbdist.core.task.each_epoch import RankHook
from nbdist.core.task.prediction import ForwardStep
from nbdist.core.task.task import Task
from nbdist.core.train import fit
from nbdist.core.transfer.payload import SegmentCache, is_released, pack, unpack
from nbdist.engine import checked_collectives
from nbdist.engine.cells import complete, namespace, prepare_cell, pull, push, tie
from nbdist.engine.debug_server import serve
from nbdist.engine.epoch_hook import ClusterHook
from nbdist.engine.failure import Failure
from nbdist.engine.follow.changes import NotebookUpdate
from nbdist.engine.follow.install import install
from nbdist.engine.follow.module_texts import watched_modules
from nbdist.engine.parent_watch import FOLDER_VARIABLE, RECORDS, outlive_termination
from nbdist.engine.stack_dump import enable
from nbdist.engine.state_publisher import StatePublisher
from nbdist.engine.train_outcome import Outcome
from nbdist.errors import TaskError
from nbdist.plan import Plan, available_cores
from nbdist.process_mark import process_mark
from nbdist.telemetry import JsonlSink, RankStateSink
from nbdist.telemetry.host import host_id, host_name
from nbdist.telemetry.record import record_path
from nbdist.upstream.ipython_private import run_cells_after_errors
from nbdist.upstream.torch_private import ThreadModes

__all__ = [
    "complete",
    "debug",
    "describe",
    "is_released",
    "join",
    "leave",
    "outcome_of",
    "ping",
    "prepare_cell",
    "pull",
    "push",
    "tie",
    "train",
]


class _Engine:
    """State of this engine between calls."""

    def __init__(self) -> None:
        self.store: Any = None  # one connection for all generations: a new one takes seconds if name resolution fails
        self.world: Any = None
        self.result_segment: Any = None  # of the last trained weights, on rank 0
        self.result_tensors: Any = None  # the same, of a model that lies in files, which these keep open
        self.output_segment: Any = None  # of the last prediction; never reused: the user may keep the outputs
        self.failure: BaseException | None = None  # of the last run, with its frames, for the debugger
        self.cell_error: BaseException | None = None  # the last one of a cell before that
        self.outcome: tuple[str, Outcome] | None = None  # of the last run, for a kernel that reattaches

    def free_outputs(self) -> None:
        """Close what the kernel has mapped: the segment of the last prediction, files of the last training."""
        self.result_tensors = None
        if self.output_segment is not None:
            self.output_segment.close()
            self.output_segment = None


_engine = _Engine()
watched_modules()  # from now on: so that it is known which text each module runs


def ping() -> int:
    """Make this process an engine, and return its pid: the kernel calls it until one answer comes."""
    run_cells_after_errors(getattr(get_ipython(), "kernel", None))
    return os.getpid()


def describe(name: str, secret: str) -> dict[str, Any]:
    """Connect to the store; return host, process and cores. This module's import has loaded torch, uninterrupted."""
    outlive_termination()
    _engine.store = connect_store(name, secret)
    return {
        "host": host_name(),
        "host_id": host_id(),
        "pid": os.getpid(),
        "mark": process_mark(os.getpid()),
        "cores": available_cores(),
        **enable(),
    }


def join(
    generation: int,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    device: str,
    threads: int,
) -> dict[str, Any]:
    """Join a new world of `size` ranks as `rank`. **Collective**. Returns its device and transport.

    Raises:
        PeerLostError: The store or another rank is gone: a secondary failure.
    """
    leave()
    checked_collectives.allow_all()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_size)
    )
    torch.set_num_threads(threads)
    _engine.world = World.form(
        store=_engine.store, rank=rank, size=size, local_rank=local_rank,
        local_size=local_size, device=device, generation=generation,
    )  # fmt: skip
    namespace().update(rank=rank, world_size=size, device=_engine.world.device)
    world = _engine.world
    return {"device": str(world.device), "transport": world.transport, "shares_gpu": world.shares_gpu}


def leave() -> None:
    """Destroy the process group; later collectives raise at once. Local."""
    if _engine.world is not None:
        _engine.world.leave()
        _engine.world = None


def train(
    payload: Any,
    run_id: str,
    update: NotebookUpdate,
    by_file: bool,
    result_released: bool,
    snapshot_paths: list[list[str]],
    from_snapshot: bool,
    publisher: StatePublisher,
) -> Outcome:
    """Train one rank of a run, or predict. **Collective**.

    Args:
        payload: Task and plan.
        run_id: The run's name in the record.
        update: Of the notebook.
        by_file: See `pack`, of the result.
        result_released: Whether the kernel has released the last result of this engine.
        snapshot_paths: Paths of the ranks' snapshot buffers.
        from_snapshot: Whether to resume from the newest snapshot.
        publisher: How states travel to the kernel, and where the record lies.
    """
    world = _engine.world
    checked_collectives.allow_all()  # in case the cell of the last `prepare_cell` never came
    notes = install(update)
    torch_state = ThreadModes()
    states = publisher.sink(world.rank)
    _engine.failure = _engine.cell_error = None
    _engine.free_outputs()
    free_unused_memory()  # reference cycles of an earlier run may hold as much memory as this one needs
    with contextlib.ExitStack() as cleanup:
        try:
            if failed := watched_modules().failures:
                raise TaskError(failed[0])
            for note in notes:
                print(f"nbdist: {note}", file=sys.stderr)
            task, plan = unpack(payload)
            if isinstance(task.step, ForwardStep):
                outcome = _predict(task, plan, run_id, by_file, states)
            else:
                hook = None
                if plan.each_epoch and world.rank == 0:
                    here = None  # the notebook has kept it
                    if task.each_epoch is not None:
                        here = RankHook(task.model, task.each_epoch, plan.each_epoch, world.device, task.optimizers)
                    hook = ClusterHook(_engine.store, run_id, by_file, here)
                options: dict[str, Any] = {
                    "run_id": run_id, "commands": CommandLog(_engine.store, run_id), "on_every_rank": False,
                    "epoch_hook": hook,
                }  # fmt: skip
                if plan.rehearse:
                    result = rehearse(task, plan, world, sinks=[states], **options)
                else:
                    record = JsonlSink(record_path(run_id, world.rank, _records(publisher)))
                    cleanup.callback(record.close)
                    result = fit(
                        task, plan, world, sinks=[record, states], snapshot_paths=snapshot_paths,
                        from_snapshot=from_snapshot, **options,
                    )  # fmt: skip
                trained = None
                if world.rank == 0 and plan.gather and not plan.rehearse:
                    trained = _pack_trained(task, by_file, result_released, result)
                outcome = Outcome(
                    rank=world.rank, state=result.state, snapshot=states.state, result=trained, ranks=result.ranks
                )
            _ignore_interrupts()
        except BaseException as error:
            _ignore_interrupts()
            failure = Failure.of(world.rank, error)
            _engine.failure = None if failure.secondary else error
            _engine.cell_error = getattr(sys, "last_value", None)
            world.leave()  # at once: its peers stop waiting for this rank
            snapshot = replace(states.state, state="failed")
            outcome = Outcome(rank=world.rank, state="failed", snapshot=snapshot, failure=failure)
            task = None
            free_frames(error)
    torch_state.put_back()
    if world.device.type == "cuda":
        free_unused_memory()  # free torch's CUDA cache for other processes, such as the notebook
    _engine.outcome = run_id, outcome
    return outcome


def _records(publisher: StatePublisher) -> Path:
    """The folder of all records: the kernel's, or on another host one that the kernel reads."""
    here = publisher.host_id == host_id()
    return publisher.records if here else Path(os.environ[FOLDER_VARIABLE], RECORDS)


def _pack_trained(task: Task, by_file: bool, released: bool, result: Result) -> Any:
    """The payload of the trained tensors, of the state of the user's own optimizers and schedulers, and of averages."""
    if task.in_file:
        move_to_file(task.model)
    table = ParamTable.of(task.model)
    _engine.result_tensors = dict(table.tensors) if task.in_file else None
    own = task.optimizers if task.own_optimizers else {}
    optimizers = {name: TrainedOptimizer(optimizer, table.objects) for name, optimizer in own.items()}
    stays = {name for name, one in table.parameters.items() if result.frozen_stays and not one.requires_grad}
    trained = {name: tensor for name, tensor in table.tensors.items() if name not in stays}
    states, ready = extra_states(task.model), ready_states(task.schedulers)
    tensors = (trained, persistence(task.model), optimizers, states, result.average, ready)
    segment_cache = SegmentCache()
    if _engine.result_segment is not None and released:
        segment_cache.recycle(_engine.result_segment, lambda: True)
    payload, _engine.result_segment = pack(tensors, by_file=by_file, segment_cache=segment_cache)
    return payload


def _predict(task: Task, plan: Plan, run_id: str, by_file: bool, states: RankStateSink) -> Outcome:
    """Predict on one rank; the gathering rank's result is the payload of a tuple with the outputs. **Collective**."""
    world, payload = _engine.world, None
    outputs = predict(task, plan, world, run_id=run_id, sinks=[states], on_every_rank=False)
    if world.rank == gathering_rank(plan.mesh):
        payload, _engine.output_segment = pack((outputs,), by_file=by_file)
    return Outcome(rank=world.rank, state="finished", snapshot=states.state, result=payload)


def debug(path: str, rank: int, prompt: str) -> None:
    """Run a debugger on the last failure here, for the kernel that listens at `path`; see `debug_server.serve`."""
    newest = getattr(sys, "last_value", None)
    if newest is _engine.cell_error:  # no cell has failed since the run
        newest = _engine.failure or newest
    serve(path, rank, prompt, newest)


def outcome_of(run_id: str, rank: int) -> Outcome:
    """What `train` returned for a run. Engines run calls in order, so during a run this waits for its end.

    An engine that did not run it has replaced one that did, and returns that one's loss.
    """
    if _engine.outcome is None or _engine.outcome[0] != run_id:
        return Outcome(rank=rank, state="failed", failure=Failure.lost(rank))
    return _engine.outcome[1]


def _ignore_interrupts() -> None:
    """Ignore SIGINT until the reply is sent: an interrupt would drop it, and the kernel would wait for ever.

    ipykernel restores its own handler after the reply.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
