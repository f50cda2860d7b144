"""What runs on an engine: the functions that the kernel calls there by name, see `trampoline`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from ipyparallel.datapub import publish_data
from IPython import get_ipython

from nbdist.core.comm.rendezvous import reach_store
from nbdist.core.comm.world import World
from nbdist.core.control.command_log import CommandLog
from nbdist.core.optim.notebook_optimizer import TrainedOptimizer
from nbdist.core.params.table import ParamTable
from nbdist.core.process.memory import free_frames, give_back
from nbdist.core.train import fit
from nbdist.core.transfer.payload import SegmentCache, is_released, pack, unpack
from nbdist.engine import checked_collectives
from nbdist.engine.cell_sources import NotebookUpdate, install, tie_classes
from nbdist.engine.debug_server import serve
from nbdist.engine.failure import Failure
from nbdist.engine.outcome import Outcome
from nbdist.engine.stack_dump import answer_from
from nbdist.engine.status_board import Board
from nbdist.plan import available_cores
from nbdist.telemetry import JsonlSink, SnapshotSink
from nbdist.telemetry.host import host_id, host_name
from nbdist.telemetry.record import record_path

__all__ = [
    "complete",
    "debug",
    "describe",
    "expect_cell",
    "has_released",
    "join",
    "leave",
    "outcome_of",
    "ping",
    "pull",
    "push",
    "tie",
    "train",
]


_REMOTE_INTERVAL_S = 0.2


class _Engine:
    """What this process remembers between calls."""

    def __init__(self) -> None:
        self.store: Any = None  # one connection for all worlds: to make one can take seconds where name servers fail
        self.world: Any = None
        self.outgoing: Any = None  # the segment of the last value that was pulled from here
        self.home: Any = None  # the segment of the last trained weights, on rank 0
        self.failure: BaseException | None = None  # of the last run, with all its frames, for a debugger
        self.outcome: tuple[str, Outcome] | None = None  # of the last run, for a kernel that comes later


_engine = _Engine()


def _namespace() -> dict[str, Any]:
    """The namespace in which cells run."""
    return get_ipython().user_ns


def ping() -> int:
    """Answer, with the number of this process."""
    return os.getpid()


def describe(name: str, secret: str) -> dict[str, Any]:
    """Load torch, before anything can interrupt its import, reach the store, and say where this engine lives."""
    _engine.store = reach_store(name, secret)
    return {
        "host": host_name(),
        "host_id": host_id(),
        "pid": os.getpid(),
        "born_s": psutil.Process().create_time(),
        "cores": available_cores(),
        **answer_from(),
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
    """Take `rank` in a new world of `size` ranks. **Collective**: every engine, at once. Returns what came out.

    Raises:
        PeerLostError: The store is gone, or another rank: an echo of its loss.
    """
    leave()
    checked_collectives.expect_all()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_size)
    )
    torch.set_num_threads(threads)
    _engine.world = World.form(
        store=_engine.store, rank=rank, size=size, local_rank=local_rank,
        local_size=local_size, device=device, generation=generation,
    )  # fmt: skip
    _namespace().update(rank=rank, world_size=size, device=_engine.world.device)
    world = _engine.world
    return {"device": str(world.device), "transport": world.transport, "shares_gpu": world.shares_gpu}


def leave() -> None:
    """Leave the world, so that there is nobody to wait for. Local."""
    if _engine.world is not None:
        _engine.world.leave()
        _engine.world = None


def push(payload: Any, news: NotebookUpdate) -> None:
    """Put the values of a packed dict into the namespace of this engine's cells."""
    install(news)
    _namespace().update(unpack(payload))


def pull(name: str, inline: bool) -> Any:
    """Pack the value of a name of this engine's cells."""
    namespace = _namespace()
    if name not in namespace:
        raise NameError(name)
    payload, _engine.outgoing = pack(namespace[name], inline=inline)
    return payload


def complete(source: str) -> tuple[str, list[str]]:
    """The word at the end of a cell's beginning, and what it could become here."""
    line = source.rpartition("\n")[2]
    completer = get_ipython().Completer
    completer.use_jedi = False  # it reads sources for half a second; the objects themselves are here
    word, found = completer.complete(None, line, len(line))
    return word, list(found)


def expect_cell(news: NotebookUpdate, number: int | None, alone: list[int] | None = None) -> None:
    """A cell follows.

    Args:
        news: Of the notebook.
        number: By which the cell is known in the notebook, if it has one.
        alone: The ranks that run it, where others do not.
    """
    install(news)
    if alone is None:
        checked_collectives.expect_all()
    else:
        events = get_ipython().events

        def ended(result: Any) -> None:
            checked_collectives.expect_all()
            events.unregister("post_run_cell", ended)

        events.register("post_run_cell", ended)
        checked_collectives.expect(alone)
    if number is not None:
        get_ipython().execution_count = number


def tie(marks: dict[str, str]) -> None:
    """Let classes defined here and in the notebook by the same cell be one."""
    tie_classes(marks, _namespace())


def has_released(path: str) -> bool:
    """Whether nothing here lies in the segment of the last payload from `path` any more."""
    return is_released(path)


def train(
    payload: Any,
    run_id: str,
    news: NotebookUpdate,
    inline: bool,
    home_free: bool,
    snapshot_paths: list[list[str]],
    from_snapshot: bool,
    boards: list[str],
    records: str,
) -> Outcome:
    """Run one rank of a training.

    Args:
        payload: Task and plan.
        run_id: Its name in the record.
        news: Of the notebook.
        inline: Whether the notebook is on another host.
        home_free: Whether the notebook has let go of the last weights from here.
        snapshot_paths: Where snapshots go.
        from_snapshot: Whether to go on from the newest one.
        boards: Where each rank says how far it is; none where the notebook is on another host.
        records: The notebook's folder of records; empty for this host's own.
    """
    world = _engine.world
    checked_collectives.expect_all()  # should a cell have been announced that never came
    install(news)
    board = Board(boards[world.rank]) if boards else None

    def publish(state: dict[str, Any]) -> None:
        if board is None:
            publish_data({"nbdist": state})
        else:
            board.write(
                json.dumps(state).encode(), seldom="curve" in state
            )  # what does not fit, thousands of rows, is told at the end

    snapshots = SnapshotSink(world.rank, publish, *(() if boards else (_REMOTE_INTERVAL_S, 0.0)))
    _engine.failure = None
    give_back()  # what a run before has left in cycles may be as large as what this one needs
    with contextlib.ExitStack() as cleanup:
        try:
            task, plan = unpack(payload)
            record = JsonlSink(record_path(run_id, world.rank, Path(records) if records else None))
            cleanup.callback(record.close)
            result = fit(
                task,
                plan,
                world,
                run_id=run_id,
                sinks=[record, snapshots],
                commands=CommandLog(_engine.store, run_id),
                on_every_rank=False,
                snapshot_paths=snapshot_paths,
                from_snapshot=from_snapshot,
            )
            home = None
            if world.rank == 0 and plan.gather:
                table = ParamTable.of(task.model)
                optimizer = TrainedOptimizer(task.optimizer, table.objects) if task.own_optimizer else None
                trained = (table.tensors, optimizer)
                segment_cache = SegmentCache()
                if _engine.home is not None and home_free:
                    segment_cache.give_back(_engine.home, lambda: True)
                home, _engine.home = pack(trained, inline=inline, segment_cache=segment_cache)
            _answer_undisturbed()
            outcome = Outcome(
                rank=world.rank, state=result.state, snapshot=snapshots.state, result=home, ranks=result.ranks
            )
        except BaseException as error:
            _answer_undisturbed()
            failure = Failure.of(world.rank, error)
            _engine.failure = None if failure.echo else error
            world.leave()  # at once: it releases the peers that wait for this rank
            snapshot = replace(snapshots.state, state="failed")
            outcome = Outcome(rank=world.rank, state="failed", snapshot=snapshot, failure=failure)
            task = None
            free_frames(error)
    if world.device.type == "cuda":
        give_back()  # what torch keeps for the next time, nobody else can have: the notebook itself, say
    _engine.outcome = run_id, outcome
    return outcome


def debug(path: str, rank: int, prompt: str) -> None:
    """Run a debugger on what failed last here, for whoever listens at `path`; see `debug_server.serve`."""
    serve(path, rank, prompt, _engine.failure or getattr(sys, "last_value", None))


def outcome_of(run_id: str, rank: int) -> Outcome:
    """What `train` returned for a run: asked while it goes on, this is called when it has ended.

    An engine that has not run it has taken the place of one that had, and tells of that one's loss.
    """
    if _engine.outcome is None or _engine.outcome[0] != run_id:
        return Outcome(rank=rank, state="failed", failure=Failure.lost(rank))
    return _engine.outcome[1]


def _answer_undisturbed() -> None:
    """Let no interrupt land until the answer is sent: it would be lost, and the notebook wait for it in vain.

    The kernel sets its own handler again when it has sent it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
