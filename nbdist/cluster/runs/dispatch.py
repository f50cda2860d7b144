"""A training on the engines: sent out, begun again where ranks were lost, brought home."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbdist.cluster.cells.cell_run import LostCall, printed
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.run import Run, RunHandoff
from nbdist.core.params.table import ParamTable
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import checkpoint_of_run, resumed_folder
from nbdist.core.state.restore import load_whole
from nbdist.core.state.snapshot import read
from nbdist.core.transfer.payload import Segment, is_released, pack, unpack
from nbdist.engine.cell_sources import CellSources
from nbdist.engine.status_board import BOARD_BYTES, Board
from nbdist.errors import ClusterError, EngineError, PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RankState
from nbdist.telemetry.record import records

__all__ = ["RunDispatch"]

_SETTLED_WITHIN_S = 10.0


class RunDispatch:
    """What is needed to begin a run on the engines, to begin it again, and to bring its weights home.

    Args:
        run: The run.
        engines: Idle engines with a world.
        task: What is trained; its model receives the weights in place, and the user's own optimizer its state.
        plan: How.
        packed: The payload of both, and its segment.
        segment_cache: Where the segment goes back to.
        cells: The cells of the notebook that the engines know.
        handoff: What another kernel has to know of it.
        into: Another model that receives the weights too, when they come home.

    Attributes:
        refusal: Why engines that were asked for after the last step could not be had.
    """

    def __init__(
        self,
        run: Run,
        engines: Engines,
        task: Any,
        plan: Plan,
        packed: tuple[Any, Any],
        segment_cache: Any,
        cells: CellSources,
        handoff: RunHandoff,
        into: Any = None,
    ) -> None:
        self.run = run
        self.engines = engines
        self._task = task
        self._plan = plan
        self._payload, self._segment = packed
        self._segment_cache = segment_cache
        self._cells = cells
        self._handoff = handoff
        self._into = into
        self._segments: list[Any] = []
        self._boards: list[Board] = []
        self._printed: list[Callable[[str], dict[int, str]]] = []
        self.refusal = ""

    def begin(self, *, from_snapshot: bool, again: bool = False) -> list[Any]:
        """Let every rank begin; returns ipyparallel's result of each.

        Args:
            from_snapshot: Whether from the newest snapshot.
            again: Whether some engine may be a new one, that knows nothing of the notebook.
        """
        engines, run = self.engines, self.run
        if engines.suspected:
            engines.form()
        if again and run.snapshot_store is not None:
            run.snapshot_store.trim()  # newer ones of some ranks would hold a slot each until the run gets there again
        news = self._cells.all() if again else self._cells.new()
        snapshot_store = [] if run.snapshot_store is None else run.snapshot_store.paths
        for segment in self._segments:
            segment.close()
        segments = [] if engines.remote else [Segment(BOARD_BYTES, engines.anchor) for _ in range(engines.size)]
        paths = [segment.path for segment in segments]
        self._listen(segments)
        if engines.anchor is not None:
            handoff = replace(self._handoff, payload=self._payload, snapshot_store=tuple(snapshot_store))
            engines.anchor.note("ended", ("running", ""))
            engines.anchor.note("run", handoff)
        folder = "" if engines.remote else str(records().resolve())
        arguments = (
            self._payload,
            run.run_id,
            news,
            engines.remote,
            is_released(engines.home),
            snapshot_store,
            from_snapshot,
            paths,
            folder,
        )
        return self._followed([engines.start_call(rank, "train", *arguments) for rank in range(engines.size)])

    def take_over(self, boards: list[str]) -> list[Any]:
        """Follow what another kernel has begun; returns a result of each rank, as `begin` does.

        Args:
            boards: Where the ranks say how far they are.
        """
        engines = self.engines
        self._listen([Segment(BOARD_BYTES, engines.anchor, path) for path in boards])
        calls: list[Any] = []
        for rank in range(engines.size):
            try:  # an engine answers when it has ended what it does
                calls.append(engines.start_call(rank, "outcome_of", self.run.run_id, rank))
            except EngineError:
                calls.append(LostCall())
        return self._followed(calls)

    def _listen(self, segments: list[Any]) -> None:
        self._segments = segments
        self._boards = [Board(segment.path) for segment in segments]
        if self.engines.anchor is not None:
            self.engines.anchor.note("boards", [segment.path for segment in segments])

    def _followed(self, calls: list[Any]) -> list[Any]:
        self._printed.append(functools.partial(printed, dict(enumerate(calls))))
        # Not bound to us, or the run's memory would outlive it.
        self.run._printed = functools.partial(_all_printed, self._printed)
        return calls

    def poll_states(self, rank: int, call: Any) -> list[RankState]:
        """What a rank has said of itself since the last time, if anything; the newest last.

        Args:
            rank: Which.
            call: Its call, as `begin` returned it.
        """
        if self._boards:
            told = [json.loads(data) for data in self._boards[rank].read()]
        else:
            told = [call.data["nbdist"]] if isinstance(call.data, dict) and "nbdist" in call.data else []
        states = [self.run.progress.ranks[rank]]
        for data in told:
            states.append(RankState.from_dict(data, states[-1]))
        return states[1:]

    def gather_ranks(self, size: int) -> None:
        """Have so many ranks, none of them lost, and a plan for them, and let all meet again.

        Raises:
            ClusterError: That did not succeed; it may the next time.
        """
        engines, run = self.engines, self.run
        self._have_ranks(size)
        if size != self._plan.mesh.size and run.replan is not None:
            self._plan = run.replan.of(self._plan, size)
            self._segment.close()
            what = f"{self._handoff.names[0]} or {self._handoff.names[1]}"
            packed = pack((self._task, self._plan), name=what, inline=engines.remote, segment_cache=self._segment_cache)
            self._payload, self._segment = packed
            run.stand_on(self._plan)
            if run.snapshot_store is not None:
                run.snapshot_store.grow(size)
        engines.form()

    def _have_ranks(self, size: int) -> None:
        self.engines.release()
        self.engines.resize(size)
        self._cells.sent.clear()

    def load_result(self, home: Any) -> None:
        """Take the trained tensors in; nothing where `gather` is off."""
        if home is None:
            return
        self.engines.home = home.path
        tensors, optimizer = unpack(home)
        table = ParamTable.of(self._task.model)
        table.load_(tensors)
        self._hand_on()
        if optimizer is not None:
            optimizer.put_into(self._task.optimizer, table.objects)

    def kept_step(self) -> int:
        """The step from which the run goes on if it is begun again now."""
        found = None if self.run.snapshot_store is None else self.run.snapshot_store.newest
        if found is not None:
            return int(found[0])
        saved = checkpoint_of_run(self._plan, self.run.run_id)
        with contextlib.suppress(PlanError):  # the ranks say it
            if saved is None and self._plan.resume and (folder := resumed_folder(self._plan)):
                saved = CheckpointReader.in_folder(folder, hashed=False)
        return 0 if saved is None else int(saved.ranks[0]["position"]["step"])

    def rescue(self) -> int | None:
        """Take in the newest snapshot that all ranks have; returns its step, None where the model stays as it was."""
        found = None if self.run.snapshot_store is None else self.run.snapshot_store.newest
        if found is None or not self._plan.gather:
            return None
        step, slots = found
        optimizer = self._task.optimizer if self._task.own_optimizer else None
        folder = resumed_folder(self._plan) if self._plan.resume else ""
        if folder:  # what never changes is in there alone
            load_whole(CheckpointReader.in_folder(folder), self._task.model, optimizer)
        load_whole(CheckpointReader.in_memory(read(slots)), self._task.model, optimizer)
        self._hand_on()
        return step

    def _hand_on(self) -> None:
        """Put the weights that came home into the other model too."""
        if self._into is not None:
            ParamTable.of(self._into).load_(ParamTable.of(self._task.model).tensors)

    def end(self, *, failed: bool) -> None:
        """Make the engines ready for what comes next; the last snapshot stays."""
        engines, run = self.engines, self.run
        for segment in self._segments:
            segment.close()
        self._segments, self._boards = [], []
        wanted = run.wanted or engines.size
        engines.formed = not failed  # ranks leave a world that failed
        if failed:
            self._segment.close()
        else:
            if wanted != engines.size:  # it was asked for when the last step was done
                try:
                    self._have_ranks(wanted)
                except ClusterError as error:
                    self.refusal = str(error)
            answers = [engines.start_call(rank, "has_released", self._payload.path) for rank in range(engines.size)]
            self._segment_cache.give_back(
                self._segment, lambda: all(a.ready() and a.successful() and a.get() for a in answers)
            )
        if run.snapshot_store is not None:
            run.snapshot_store.trim()
        if engines.anchor is not None:
            engines.anchor.note("ended", (run.progress.state, run.progress.error))
        deadline = time.monotonic() + _SETTLED_WITHIN_S
        while failed and engines.reachable and not (engines.ended or engines.formed) and time.monotonic() < deadline:
            with contextlib.suppress(ClusterError):
                self._have_ranks(wanted)
                engines.form()
            wanted = engines.size


def _all_printed(printed_each: list[Callable[[str], dict[int, str]]], stream: str) -> dict[int, str]:
    """What ranks have printed, before and after they were replaced."""
    texts: dict[int, str] = {}
    for printed_then in printed_each:
        for rank, text in printed_then(stream).items():
            texts[rank] = texts.get(rank, "") + text
    return texts
