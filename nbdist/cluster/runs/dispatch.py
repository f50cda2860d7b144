"""Dispatch of a run to the engines: start it, restart it after ranks were lost, load its trained weights."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nbdist.cluster.calls.pending_call import LostCall, PendingCall
from nbdist.cluster.cells.cell_run import printed
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.rank_boards import RankBoards
from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RunHandoff
from nbdist.core.optim.lr_schedulers import load_ready
from nbdist.core.params.extra_state import extra_states, set_extra_states
from nbdist.core.params.made_buffers import adopt_buffers, persistence
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.weight_copies import EMA
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import checkpoint_of_run, folder_to_resume
from nbdist.core.state.restore import load_best, load_whole
from nbdist.core.task.modules import with_averages
from nbdist.core.task.task import Task
from nbdist.core.transfer.payload import Segment, SegmentCache, pack
from nbdist.engine.follow.changes import NotebookChanges
from nbdist.errors import ClusterError, EngineError, PlanError
from nbdist.telemetry import RankState

__all__ = ["RunDispatch"]

_FORM_AGAIN_WITHIN_S = 10.0


class RunDispatch:
    """Starts a run on the engines, restarts it, and loads its weights into the notebook's model.

    Args:
        control: The run. Its task's model receives the weights in place, and the user's own optimizers their state.
        engines: Idle engines with a world.
        segment_cache: Makes the segments of payloads.
        changes: Of the notebook, for the engines.
        count: How many of them came before the run: later ones are not for it.
        packed: The payload of task and plan, and its segment; by default they are packed now.
        into: Another model that receives the weights too.

    Attributes:
        scale_error: Why a scale command after the last step failed; empty if none did.
    """

    def __init__(
        self,
        control: RunControl,
        engines: Engines,
        segment_cache: SegmentCache,
        changes: NotebookChanges,
        count: int,
        *,
        packed: tuple[Any, Segment] | None = None,
        into: Any = None,
    ) -> None:
        self.control = control
        self.engines = engines
        self._segment_cache = segment_cache
        self._payload, self._segment = packed or self._pack()
        self._changes, self._count = changes, count
        self._into = into
        self._boards: RankBoards | None = None
        self.scale_error = ""

    @property
    def _task(self) -> Task:
        task = self.control.spec.task
        assert task is not None  # it is forgotten at the end
        return task

    def _pack(self) -> tuple[Any, Segment]:
        spec = self.control.spec
        names = self._task.named(*spec.names)
        return pack(
            (spec.task, spec.plan), names=names, by_file=self.engines.share_memory, segment_cache=self._segment_cache,
            registries=True,
        )  # fmt: skip

    def start(self, *, from_snapshot: bool, restart: bool = False) -> list[PendingCall]:
        """Call `train` on every rank; returns the calls.

        Args:
            from_snapshot: Whether to resume from the newest snapshot.
            restart: Whether ranks were training already.
        """
        engines, store = self.engines, self.control.snapshot_store
        if engines.suspected:
            engines.form()
        if restart and store is not None:
            store.trim()  # newer snapshots of only some ranks would occupy a buffer each
        if from_snapshot and store is not None:
            store.distribute()
        update = self._changes.update(engines.processes.values(), self._count)
        self._changes.save(engines.anchor)
        boards = self._make_boards()
        buffers = [[] if store is None else store.paths_on(host) for host in engines.placed().values()]
        if engines.anchor is not None and self.control.spec.trains:
            spec = replace(self.control.spec, task=None)  # which the payload holds
            engines.anchor.note("ended", ("running", ""))
            engines.anchor.note(
                "run",
                RunHandoff(
                    spec=spec,
                    payload=self._payload,
                    snapshot_paths=() if store is None else tuple(store.paths),
                    elsewhere={} if store is None else store.elsewhere,
                ),
            )
        payloads = engines.payloads.place(self._payload, range(engines.size))
        arguments = self.control.spec.run_id, update, engines.share_memory, engines.payloads.result_is_released
        return self._with_output(
            [
                engines.start_call(
                    rank, "train", payloads[rank], *arguments, buffers[rank], from_snapshot, boards.publisher
                )
                for rank in range(engines.size)
            ]
        )

    def take_over(self, boards: list[str]) -> list[PendingCall]:
        """Attach to a run that another kernel started; returns a call of each rank, as `start` does.

        Args:
            boards: Paths of the ranks' status boards.
        """
        engines = self.engines
        self._make_boards(boards)
        calls: list[PendingCall] = []
        for rank in range(engines.size):
            try:  # an engine runs this call after the one it is in: `train`
                calls.append(engines.start_call(rank, "outcome_of", self.control.spec.run_id, rank))
            except EngineError:
                calls.append(LostCall())
        return self._with_output(calls)

    def _make_boards(self, paths: Sequence[str] = ()) -> RankBoards:
        engines = self.engines
        if self._boards is not None:
            self._boards.close()
        self._boards = boards = RankBoards(engines, paths)
        if engines.anchor is not None and self.control.spec.trains:
            engines.anchor.note("boards", boards.paths)
        return boards

    def _with_output(self, calls: list[PendingCall]) -> list[PendingCall]:
        """The same calls; their output is added to `Run.printed`."""
        # Not a bound method: the Run would keep this object, and so the run's memory.
        self.control.add_output(functools.partial(printed, dict(enumerate(calls))))
        return calls

    def poll_states(self) -> list[RankState]:
        """States that ranks have published since the last call, each rank's newest last; see `RankBoards.read`."""
        found = {} if self._boards is None else self._boards.read()
        states: list[RankState] = []
        for rank, published in found.items():
            state = self.control.progress.ranks[rank]
            for data in published:
                states.append(state := RankState.from_dict(data, state))
        return states

    def prepare_ranks(self, size: int) -> None:
        """Provide `size` living ranks, a plan for them, and a new process group.

        Raises:
            ClusterError: That failed; a second attempt may succeed.
        """
        control = self.control
        self._resize(size)
        if size != control.spec.plan.mesh.size:
            control.resize(size)
            self._free_payload()
            self._payload, self._segment = self._pack()
            if control.snapshot_store is not None:
                control.snapshot_store.grow(size)
        self.engines.form()

    def _resize(self, size: int) -> None:
        self.engines.release()
        self.engines.resize(size)
        self._changes.forget()  # ranks were interrupted, perhaps before they had taken the last ones

    def _free_payload(self) -> None:
        self.engines.payloads.release(self._payload)
        self._segment.close()

    def open_result(self, payload: Any, rank: int) -> Any:
        """Open the result of a rank, which then outlives that rank; None if `gather` is off.

        Raises:
            ClusterError: The rank has ended, and its memory with it.
        """
        if payload is None:
            return None
        payloads = self.engines.payloads
        return payloads.open(payload, rank) if self.control.spec.predicts else payloads.open_result(payload, rank)

    def load_result(self, result: Any) -> None:
        """Load the trained tensors of an `open_result`; of a prediction, keep its outputs."""
        if self.control.spec.predicts:
            (self.control.outputs,) = result
            return
        if result is None:
            return
        tensors, persistent, optimizers, states, average, ready = result
        adopt_buffers(self._task.model, tensors, persistent)
        table = ParamTable.of(self._task.model)
        table.load_(tensors)
        set_extra_states(self._task.model, states)
        self._copy_to_other()
        for name, optimizer in optimizers.items():
            optimizer.load_into(self._task.optimizers[name], table.objects)
        load_ready(self._task.schedulers, ready)
        self._keep_average(average)

    def resume_step(self) -> int:
        """The step from which a restart would continue: of the newest snapshot, else of a checkpoint, else 0."""
        spec, store = self.control.spec, self.control.snapshot_store
        if store is not None:
            store.refresh()
        found = None if store is None else store.newest
        if found is not None:
            return found[0]
        saved = checkpoint_of_run(spec.plan, spec.run_id)
        with contextlib.suppress(PlanError):  # the ranks raise it
            if saved is None and spec.plan.resume and (folder := folder_to_resume(spec.plan)):
                saved = CheckpointReader.in_folder(folder, hashed=False)
        return 0 if saved is None else saved.step

    def load_newest_snapshot(self, *, best: bool = False) -> int | None:
        """Load the newest snapshot that all ranks have; returns its step, None if the model stays unchanged.

        Args:
            best: Whether to load the weights of the best epoch in it, if the run keeps them.
        """
        plan, store = self.control.spec.plan, self.control.snapshot_store
        if store is not None:
            store.refresh()
        if store is None or not plan.gather or (snapshot := CheckpointReader.of_snapshot(store.paths)) is None:
            return None
        optimizers = self._task.optimizers if self._task.own_optimizers else {}
        folder = folder_to_resume(plan) if plan.resume else ""
        if folder:  # snapshots leave out what never changes: only this checkpoint has it
            load_whole(CheckpointReader.in_folder(folder), self._task.model, optimizers)
        load_whole(snapshot, self._task.model, optimizers)
        load_ready(self._task.schedulers, snapshot.ranks[0]["schedulers"], saved=True)
        if best and plan.keep_best:
            load_best(snapshot, self._task.model)
        self._copy_to_other()
        self._keep_average({name: snapshot.whole(name, EMA).clone() for name in snapshot.copies(EMA)})
        return snapshot.step

    def _keep_average(self, average: dict[str, torch.Tensor]) -> None:
        if self.control.spec.plan.ema is not None and average:
            self.control.ema = with_averages(self._task.model, average)

    def _copy_to_other(self) -> None:
        """Copy the loaded weights into the other model too."""
        if self._into is not None:
            adopt_buffers(self._into, dict(self._task.model.named_buffers()), persistence(self._task.model))
            ParamTable.of(self._into).load_(ParamTable.of(self._task.model).tensors)
            set_extra_states(self._into, extra_states(self._task.model))

    def end(self, *, failed: bool) -> None:
        """Make the engines ready for the next run; the last snapshot stays."""
        engines, control = self.engines, self.control
        if self._boards is not None:
            self._boards.close()
            self._boards = None
        wanted = control.wanted or engines.size
        if failed:
            engines.dissolve()  # ranks leave the process group of a failed run
            self._changes.forget()
            self._free_payload()
        else:
            if wanted != engines.size:  # a scale command came after the last step
                try:
                    self._resize(wanted)
                except ClusterError as error:
                    self.scale_error = str(error)
            # Reused only once no engine maps it: a private mapping would show the new contents.
            engines.payloads.release(self._payload)  # of copies, only the memory
            replies = [engines.start_call(rank, "is_released", self._payload.path) for rank in range(engines.size)]
            self._segment_cache.recycle(self._segment, lambda: all(r.succeeded and r.result() for r in replies))
        if control.snapshot_store is not None:
            control.snapshot_store.trim()
        if engines.anchor is not None and control.spec.trains:
            engines.anchor.note("ended", (control.progress.state, control.progress.error))
        deadline = time.monotonic() + _FORM_AGAIN_WITHIN_S
        while failed and engines.reachable and not (engines.ended or engines.formed) and time.monotonic() < deadline:
            with contextlib.suppress(ClusterError):
                self._resize(wanted)
                engines.form()
            wanted = engines.size
