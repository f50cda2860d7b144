"""What runs on an engine: the functions that the cluster calls there, by reference."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbdist.cluster.board import Board
from nbdist.cluster.definitions import News, install, tie_classes
from nbdist.cluster.remote_errors import Failure
from nbdist.cluster.stacks import answer_from
from nbdist.telemetry import RankState
from nbdist.telemetry.host import host_id, host_name

__all__ = [
    "Outcome",
    "complete",
    "expect_cell",
    "has_let_go",
    "hear",
    "hello",
    "join",
    "last_failure",
    "leave",
    "outcome_of",
    "pull",
    "push",
    "tie",
    "train",
]


_REMOTE_INTERVAL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank of a training brings home.

    Args:
        rank: Which.
        state: "finished", "stopped", "scaled" or "failed".
        snapshot: The rank's last state; published ones may arrive late.
        home: The parcel of trained tensors, from rank 0.
        failure: What went wrong.
        ranks: How many there are to be from here on, where that was asked for; else 0.
    """

    rank: int
    state: str
    snapshot: RankState | None = None
    home: Any = None
    failure: Failure | None = None
    ranks: int = 0


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
    from IPython import get_ipython

    return get_ipython().user_ns


def hear() -> None:
    """Answer, and do nothing else."""


def hello(name: str, secret: str) -> dict[str, Any]:
    """Load torch, before anything can interrupt its import, reach the store, and say where this engine lives."""
    import psutil

    from nbdist.core import train  # noqa: F401 - loaded while nobody waits
    from nbdist.core.channels.meeting import reach_store
    from nbdist.plan import available_cores

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
    import torch

    from nbdist.core import attendance
    from nbdist.core.world import World

    leave()
    attendance.expect_all()
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


def push(parcel: Any, news: News) -> None:
    """Put the values of a packed dict into the namespace of this engine's cells."""
    from nbdist.core.handover import unpack

    install(news)
    _namespace().update(unpack(parcel))


def pull(name: str, inline: bool) -> Any:
    """Pack the value of a name of this engine's cells."""
    from nbdist.core.handover import pack

    namespace = _namespace()
    if name not in namespace:
        raise NameError(name)
    parcel, _engine.outgoing = pack(namespace[name], inline=inline)
    return parcel


def complete(source: str) -> tuple[str, list[str]]:
    """The word at the end of a cell's beginning, and what it could become here."""
    from IPython import get_ipython

    line = source.rpartition("\n")[2]
    completer = get_ipython().Completer
    completer.use_jedi = False  # it reads sources for half a second; the objects themselves are here
    word, found = completer.complete(None, line, len(line))
    return word, list(found)


def expect_cell(news: News, number: int | None, alone: list[int] | None = None) -> None:
    """A cell follows.

    Args:
        news: Of the notebook.
        number: By which the cell is known in the notebook, if it has one.
        alone: The ranks that run it, where others do not.
    """
    from IPython import get_ipython

    from nbdist.core import attendance

    install(news)
    if alone is None:
        attendance.expect_all()
    else:
        events = get_ipython().events

        def ended(result: Any) -> None:
            attendance.expect_all()
            events.unregister("post_run_cell", ended)

        events.register("post_run_cell", ended)
        attendance.expect(alone)
    if number is not None:
        get_ipython().execution_count = number


def tie(marks: dict[str, str]) -> None:
    """Let classes defined here and in the notebook by the same cell be one."""
    tie_classes(marks, _namespace())


def has_let_go(path: str) -> bool:
    """Whether nothing here lies in the segment of the last parcel from `path` any more."""
    from nbdist.core.handover import let_go

    return let_go(path)


def train(
    parcel: Any,
    run_id: str,
    news: News,
    inline: bool,
    home_free: bool,
    vaults: list[list[str]],
    go_on: bool,
    boards: list[str],
    records: str,
) -> Outcome:
    """Run one rank of a training.

    Args:
        parcel: Task and plan.
        run_id: Its name in the record.
        news: Of the notebook.
        inline: Whether the notebook is on another host.
        home_free: Whether the notebook has let go of the last weights from here.
        vaults: Where snapshots go.
        go_on: Whether to go on from the newest one.
        boards: Where each rank says how far it is; none where the notebook is on another host.
        records: The notebook's folder of records; empty for this host's own.
    """
    from ipyparallel.datapub import publish_data

    from nbdist.core import attendance, fit
    from nbdist.core.allocator import give_back, let_go_after
    from nbdist.core.handover import Outbox, pack, unpack
    from nbdist.core.optimizer_home import OptimizerHome
    from nbdist.core.order_log import OrderLog
    from nbdist.core.params import ParamTable
    from nbdist.telemetry import JsonlSink, SnapshotSink
    from nbdist.telemetry.record import record_path

    world = _engine.world
    attendance.expect_all()  # should a cell have been announced that never came
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
            task, plan = unpack(parcel)
            record = JsonlSink(record_path(run_id, world.rank, Path(records) if records else None))
            cleanup.callback(record.close)
            result = fit(
                task,
                plan,
                world,
                run_id=run_id,
                sinks=[record, snapshots],
                orders=OrderLog(_engine.store, run_id),
                home=False,
                vaults=vaults,
                go_on=go_on,
            )
            home = None
            if world.rank == 0 and plan.gather:
                table = ParamTable.of(task.model)
                optimizer = OptimizerHome(task.optimizer, table.objects) if task.own_optimizer else None
                trained = (table.tensors, optimizer)
                outbox = Outbox()
                if _engine.home is not None and home_free:
                    outbox.give_back(_engine.home, lambda: True)
                home, _engine.home = pack(trained, inline=inline, outbox=outbox)
            _answer_undisturbed()
            outcome = Outcome(
                rank=world.rank, state=result.state, snapshot=snapshots.state, home=home, ranks=result.ranks
            )
        except BaseException as error:
            _answer_undisturbed()
            failure = Failure.of(world.rank, error)
            _engine.failure = None if failure.echo else error
            world.leave()  # at once: it releases the peers that wait for this rank
            snapshot = replace(snapshots.state, state="failed")
            outcome = Outcome(rank=world.rank, state="failed", snapshot=snapshot, failure=failure)
            task = None
            let_go_after(error)
    if world.device.type == "cuda":
        give_back()  # what torch keeps for the next time, nobody else can have: the notebook itself, say
    _engine.outcome = run_id, outcome
    return outcome


def last_failure() -> BaseException | None:
    """What the last run failed with here, if it did so by itself."""
    return _engine.failure


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
