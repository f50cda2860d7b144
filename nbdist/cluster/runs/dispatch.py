"""Dispatch of a run to the engines: start it, restart it after ranks were lost, load its trained weights."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nbdist.cluster.cells.cell_run import LostCall, printed
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.run import Run, RunHandoff
from nbdist.core.params.param_table import ParamTable
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import checkpoint_of_run, folder_to_resume
from nbdist.core.state.restore import load_whole
from nbdist.core.state.snapshot import read
from nbdist.core.transfer.payload import is_released, unpack
from nbdist.engine.cell_sources import CellSources
from nbdist.engine.exchange.exchange import StateReader
from nbdist.errors import ClusterError, EngineError, PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RankState

__all__ = ["RunDispatch"]

_FORM_AGAIN_WITHIN_S = 10.0


class RunDispatch:
    """Starts a run on the engines, restarts it, and loads its weights into the notebook's model.

    Args:
        run: The run.
        engines: Idle engines with a world.
        task: The task; its model receives the weights in place, and the user's own optimizer its state.
        plan: The plan.
        packed: The payload of both, and its segment.
        segment_cache: Reuses the segment for later payloads.
        cells: The notebook cells that were sent to the engines.
        handoff: What another kernel needs to reattach.
        into: Another model that receives the weights too.

    Attributes:
        scale_error: Why a scale command after the last step failed; empty if none did.
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
        self._states: StateReader | None = None
        self._printed: list[Callable[[str], dict[int, str]]] = []
        self.scale_error = ""

    def start(self, *, from_snapshot: bool, restart: bool = False) -> list[Any]:
        """Call `train` on every rank; returns ipyparallel's result of each.

        Args:
            from_snapshot: Whether to resume from the newest snapshot.
            restart: Whether some engines may be new, without the notebook's cells.
        """
        engines, run = self.engines, self.run
        if engines.suspected:
            engines.form()
        if restart and run.snapshot_store is not None:
            run.snapshot_store.trim()  # newer snapshots of only some ranks would occupy a buffer each
        update = self._cells.all() if restart else self._cells.new()
        snapshot_store = [] if run.snapshot_store is None else run.snapshot_store.paths
        states = self._read_states()
        if engines.anchor is not None:
            handoff = replace(self._handoff, payload=self._payload, snapshot_store=tuple(snapshot_store))
            engines.anchor.note("ended", ("running", ""))
            engines.anchor.note("run", handoff)
        arguments = (
            self._payload,
            run.run_id,
            update,
            engines.exchange,
            is_released(engines.result_path),
            snapshot_store,
            from_snapshot,
            states.publisher,
        )
        return self._with_output([engines.start_call(rank, "train", *arguments) for rank in range(engines.size)])

    def take_over(self, boards: list[str]) -> list[Any]:
        """Attach to a run that another kernel started; returns a result of each rank, as `start` does.

        Args:
            boards: Paths of the ranks' status boards.
        """
        engines = self.engines
        self._read_states(boards)
        calls: list[Any] = []
        for rank in range(engines.size):
            try:  # an engine runs this call after the one it is in: `train`
                calls.append(engines.start_call(rank, "outcome_of", self.run.run_id, rank))
            except EngineError:
                calls.append(LostCall())
        return self._with_output(calls)

    def _read_states(self, paths: Sequence[str] = ()) -> StateReader:
        engines = self.engines
        if self._states is not None:
            self._states.close()
        self._states = states = engines.exchange.state_reader(engines.size, engines.anchor, paths)
        if engines.anchor is not None:
            engines.anchor.note("boards", states.paths)
        return states

    def _with_output(self, calls: list[Any]) -> list[Any]:
        """The same calls; their output is added to `Run.printed`."""
        self._printed.append(functools.partial(printed, dict(enumerate(calls))))
        # Not a bound method: the Run would keep this object, and so the run's memory.
        self.run._printed = functools.partial(_all_printed, self._printed)
        return calls

    def poll_states(self, rank: int, call: Any) -> list[RankState]:
        """The states that a rank has published since the last call, if any; the newest last.

        Args:
            rank: The rank.
            call: Its call, as `start` returned it.
        """
        published = [] if self._states is None else self._states.read(rank, call)
        states = [self.run.progress.ranks[rank]]
        for data in published:
            states.append(RankState.from_dict(data, states[-1]))
        return states[1:]

    def prepare_ranks(self, size: int) -> None:
        """Provide `size` living ranks, a plan for them, and a new process group.

        Raises:
            ClusterError: That failed; a second attempt may succeed.
        """
        engines, run = self.engines, self.run
        self._resize(size)
        if size != self._plan.mesh.size and run.replan is not None:
            self._plan = run.replan.of(self._plan, size)
            self._segment.close()
            what = f"{self._handoff.names[0]} or {self._handoff.names[1]}"
            packed = engines.exchange.pack((self._task, self._plan), name=what, segment_cache=self._segment_cache)
            self._payload, self._segment = packed
            run.stand_on(self._plan)
            if run.snapshot_store is not None:
                run.snapshot_store.grow(size)
        engines.form()

    def _resize(self, size: int) -> None:
        self.engines.release()
        self.engines.resize(size)
        self._cells.sent.clear()

    def load_result(self, payload: Any) -> None:
        """Load the trained tensors from rank 0's payload; does nothing if `gather` is off."""
        if payload is None:
            return
        self.engines.result_path = payload.path
        tensors, optimizer = unpack(payload)
        table = ParamTable.of(self._task.model)
        table.load_(tensors)
        self._copy_to_other()
        if optimizer is not None:
            optimizer.load_into(self._task.optimizer, table.objects)

    def resume_step(self) -> int:
        """The step from which a restart would continue: of the newest snapshot, else of a checkpoint, else 0."""
        found = None if self.run.snapshot_store is None else self.run.snapshot_store.newest
        if found is not None:
            return int(found[0])
        saved = checkpoint_of_run(self._plan, self.run.run_id)
        with contextlib.suppress(PlanError):  # the ranks raise it
            if saved is None and self._plan.resume and (folder := folder_to_resume(self._plan)):
                saved = CheckpointReader.in_folder(folder, hashed=False)
        return 0 if saved is None else int(saved.ranks[0]["position"]["step"])

    def load_newest_snapshot(self) -> int | None:
        """Load the newest snapshot that all ranks have; returns its step, None if the model stays unchanged."""
        found = None if self.run.snapshot_store is None else self.run.snapshot_store.newest
        if found is None or not self._plan.gather:
            return None
        step, buffers = found
        optimizer = self._task.optimizer if self._task.own_optimizer else None
        folder = folder_to_resume(self._plan) if self._plan.resume else ""
        if folder:  # snapshots leave out what never changes: only this checkpoint has it
            load_whole(CheckpointReader.in_folder(folder), self._task.model, optimizer)
        load_whole(CheckpointReader.in_memory(read(buffers)), self._task.model, optimizer)
        self._copy_to_other()
        return step

    def _copy_to_other(self) -> None:
        """Copy the loaded weights into the other model too."""
        if self._into is not None:
            ParamTable.of(self._into).load_(ParamTable.of(self._task.model).tensors)

    def end(self, *, failed: bool) -> None:
        """Make the engines ready for the next run; the last snapshot stays."""
        engines, run = self.engines, self.run
        if self._states is not None:
            self._states.close()
            self._states = None
        wanted = run.wanted or engines.size
        engines.formed = not failed  # ranks leave the process group of a failed run
        if failed:
            self._segment.close()
        else:
            if wanted != engines.size:  # a scale command came after the last step
                try:
                    self._resize(wanted)
                except ClusterError as error:
                    self.scale_error = str(error)
            # Reused only once no engine maps it: a private mapping would show the new contents.
            replies = [engines.start_call(rank, "is_released", self._payload.path) for rank in range(engines.size)]
            self._segment_cache.recycle(
                self._segment, lambda: all(r.ready() and r.successful() and r.get() for r in replies)
            )
        if run.snapshot_store is not None:
            run.snapshot_store.trim()
        if engines.anchor is not None:
            engines.anchor.note("ended", (run.progress.state, run.progress.error))
        deadline = time.monotonic() + _FORM_AGAIN_WITHIN_S
        while failed and engines.reachable and not (engines.ended or engines.formed) and time.monotonic() < deadline:
            with contextlib.suppress(ClusterError):
                self._resize(wanted)
                engines.form()
            wanted = engines.size


def _all_printed(printed_each: list[Callable[[str], dict[int, str]]], stream: str) -> dict[int, str]:
    """What ranks have printed, before and after restarts."""
    texts: dict[int, str] = {}
    for printed_then in printed_each:
        for rank, text in printed_then(stream).items():
            texts[rank] = texts.get(rank, "") + text
    return texts
