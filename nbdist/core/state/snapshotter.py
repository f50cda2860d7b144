"""When a rank keeps the state of its training: in memory often, on disk as asked, and when an error ends it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.lr_schedulers import Scheduler
from nbdist.core.process import rng
from nbdist.core.state.checkpoint_writer import CheckpointWriter, prepare
from nbdist.core.state.folder_lease import Lease
from nbdist.core.state.progress import TrainProgress
from nbdist.core.state.restore import ORDER
from nbdist.core.state.shard_plan import ShardPlan, check_state, from_all
from nbdist.core.state.snapshot import RankSnapshots, SnapshotBuffer, SnapshotStore
from nbdist.core.state.step_guard import StepGuard
from nbdist.core.state.tensor_buffer import TensorLayout
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.gradient_sync import ControlFlags
from nbdist.errors import NbdistError, TaskError
from nbdist.plan import Plan, available_bytes
from nbdist.telemetry import Checkpointed, Event, Noted

__all__ = ["Snapshotter"]

_SHARE = 200
"""A snapshot is taken when the training has gone on this many times as long as the last one took."""
_MEMORY_SHARE = 0.5
"""Of the free memory that snapshots of all ranks may take."""


class Snapshotter:
    """Keeps what this rank has to keep. **Collective** over the world: the constructor.

    Rank 0 says when: it asks for a snapshot or a checkpoint in the gradient sync of a step, so all ranks keep the
    state after that same step, at no cost.

    Args:
        strategy: What is trained, placed.
        plan: How; its `checkpoint` options.
        scheduler: Kept too.
        rank_snapshots: Where snapshots go; None where none are taken. A checkpoint is written from one.
        tell: Called with what a user should know.
        run_id: Of which run.
        lease: Of the planned folder, on rank 0.
        changed: See `ShardPlan`.
    """

    def __init__(
        self, strategy: Strategy, plan: Plan, scheduler: Scheduler, rank_snapshots: RankSnapshots | None,
        tell: Callable[[Event], None], run_id: str = "", lease: Lease | None = None, changed: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._strategy = strategy
        self._plan = plan
        self._scheduler = scheduler
        self._rank_snapshots = rank_snapshots
        self._notes = rank_snapshots  # of each step that is done, whether snapshots are taken or not
        self._spool = rank_snapshots  # what is written to disk passes through memory, of its own if need be
        self._tell = tell
        self._changed = changed
        self._run_id = run_id
        self._leases: dict[str, Lease | None] = {}  # of the folders that a user has named, until the end of the run
        self._axes: MeshChannels = strategy.axes
        self._rank, self._ranks = strategy.axes.world.rank, strategy.axes.world.size
        self._shard_plan: ShardPlan | None = None
        self._own: SnapshotStore | None = None
        self._writer: CheckpointWriter | None = None  # the one that wrote last
        self._planned: CheckpointWriter | None = None
        if rank_snapshots is not None or plan.checkpoint:
            self._open()
        if plan.checkpoint:
            self._writer = self._planned = self._make_writer(plan.checkpoint, plan.checkpoint_keep, lease)
        self._checked = False
        self._layouts: list[TensorLayout] = []
        self._kept_at = -1
        self._snapshot_due_s = 0.0
        self._every_steps, self._every_s = plan.checkpoint_cadence
        self._checkpoint_due_s = time.monotonic() + (self._every_s or 0.0)
        self._checkpoint_due = False
        self._step_guard = StepGuard(strategy.task.model) if rank_snapshots is not None else None

    def _open(self) -> None:
        """Find out what this rank has to keep, and where. **Collective** over the world."""
        if self._shard_plan is None:
            task, strategy = self._strategy.task, self._strategy
            self._shard_plan = ShardPlan(task.model, strategy.table, task.optimizer, strategy.axes, self._changed)
            self._described = json.dumps(self._shard_plan.described)
        if self._spool is None:
            self._own = SnapshotStore(1)
            self._spool = RankSnapshots(self._own.paths[0])

    def _make_writer(self, folder: str, keep: int, lease: Lease | None) -> CheckpointWriter:
        mark = self._axes.world.broadcast_bytes(secrets.token_hex(4).encode()).decode()
        return CheckpointWriter(folder, keep, mark, self._rank, self._ranks, lease)

    def flags(self, position: TrainProgress) -> ControlFlags:
        """What this rank has to say at the end of the step that begins at `position`; some signals are not its.

        Local.
        """
        writer = self._writer
        if self._rank_snapshots is None and writer is None:
            return ControlFlags()
        self._report()
        done = writer is not None and writer.done
        failed = writer is not None and writer.failed
        flags = ControlFlags(written=done and not failed, unwritten=done and failed)
        if self._rank:
            return flags
        now = time.monotonic()
        if self._planned is not None:
            self._checkpoint_due |= bool(self._every_steps) and (position.step + 1) % self._every_steps == 0
            self._checkpoint_due |= bool(self._every_s) and now >= self._checkpoint_due_s
        return flags._replace(
            snapshot=self._rank_snapshots is not None and now >= self._snapshot_due_s,
            checkpoint=self._checkpoint_due and not (writer and writer.working),
        )

    def begin_update(self) -> None:
        """Weights and state are about to change. Local."""
        if self._step_guard is not None:
            self._step_guard.leave()

    def end_step(self, position: TrainProgress, agreed: ControlFlags | None) -> None:
        """A step is complete, or an epoch; `agreed` is what all ranks have said in it. Local, at once on all ranks."""
        if self._step_guard is not None:
            self._step_guard.reach()
        if self._notes is not None:
            self._notes.note(position.step)
        if agreed is None:
            return
        if self._planned is not None and not self._checked:
            self._check()
        if position.step - self._strategy.lag <= self._kept_at:
            return  # it was said before the last snapshot was taken: what was asked for has been done
        if self._writer is not None and self._writer.busy and agreed.written + agreed.unwritten == self._ranks:
            self._settle(agreed.unwritten == 0)
        if agreed.checkpoint and self._planned is not None:
            self._checkpoint_due, self._checkpoint_due_s = False, time.monotonic() + (self._every_s or 0.0)
            self._writer = self._planned
            self._write(self._writer, position)
        elif agreed.snapshot and self._rank_snapshots is not None:
            self._keep(position)

    def write_checkpoint(self, position: TrainProgress, folder: str) -> None:
        """Begin to write the state to a folder, because a user asks for it; who cannot says why. **Collective**."""
        world = self._axes.world
        self.settle()
        problem, slot = "", None
        folder = world.broadcast_bytes(self._known(folder).encode()).decode()
        try:
            if folder == self._plan.checkpoint and self._planned is not None:
                self._writer = self._planned
            else:
                if folder not in self._leases:
                    self._leases[folder] = prepare(folder, self._strategy.task.optimizer, world, self._run_id)
                self._writer = self._make_writer(folder, sys.maxsize, self._leases[folder])
            self._open()
            slot = self._take(position, everything=True)
        except NbdistError as error:
            problem = str(error)
        problems = [told for told in from_all(problem, world) if told]
        if slot is not None and not problems and self._writer is not None and self._shard_plan is not None:
            self._writer.begin(slot, position.step, self._shard_plan)
        for told in problems[:1]:
            self._tell(Noted(rank=self._rank, text=f"no checkpoint was written, the run goes on: {told}"))

    def _known(self, folder: str) -> str:
        """The name by which a folder is known already; by another, our lease would be taken for a rival's. Local."""
        for name in [*([self._plan.checkpoint] if self._planned is not None else []), *self._leases]:
            with contextlib.suppress(OSError):
                if os.path.samefile(name, folder):
                    return name
        return folder

    def settle(self) -> None:
        """Wait until a checkpoint that is under way counts, or could not be written. **Collective** over the world."""
        if self._writer is None:
            return
        if self._writer.busy:
            self._settle_together()
        self._writer.wait()
        self._report()

    def finish(self, position: TrainProgress) -> None:
        """Keep the last state, on disk too if there is a folder. **Collective** over the world."""
        self.settle()
        if self._planned is not None:
            self._writer = self._planned
            self._write(self._writer, position)
            self.settle()
        elif self._rank_snapshots is not None:
            self._keep(position)
        if self._writer is not None:
            self._axes.world.all_reduce_(torch.ones(1, device=self._strategy.device))  # it can be read from here on

    def rescue(self, position: TrainProgress) -> None:
        """After an error: keep the state of the last complete step, if this rank still has it. Local."""
        moved = self._shard_plan is not None and self._shard_plan.moved()  # maybe in the step that has failed, too
        if self._step_guard is not None and position.step and self._step_guard.intact and not moved:
            self._strategy.restore_shards()
            self._keep(position, self._step_guard.buffers)

    def close(self) -> None:
        """Let what is being written come to its end. Local, twice is fine."""
        if self._writer is not None:
            self._writer.wait()
        for lease in self._leases.values():
            if lease is not None:
                lease.release()
        if self._own is not None:
            self._own.close()
        if self._shard_plan is not None:
            self._shard_plan.close()

    def _settle_together(self) -> None:
        """Wait until the checkpoint under way has been written everywhere, or could not be. **Collective**."""
        assert self._writer is not None
        self._writer.wait()
        failed = torch.tensor([float(self._writer.failed)], device=self._strategy.device)
        self._axes.world.all_reduce_(failed)
        self._settle(not failed.item())
        self._writer.wait()

    def _settle(self, whole: bool) -> None:
        assert self._writer is not None
        self._report()
        self._writer.settle(whole)

    def _report(self) -> None:
        """Tell what has become of checkpoints."""
        writer = self._writer
        while writer is not None and writer.problems:
            self._tell(Noted(rank=self._rank, text=writer.problems.pop(0)))
        while writer is not None and writer.counted:
            step, path, seconds = writer.counted.pop(0)
            self._tell(Checkpointed(rank=self._rank, step=step, path=path, seconds=seconds))

    def _write(self, writer: CheckpointWriter, position: TrainProgress) -> None:
        """Begin to write the state to the planned folder. Local, at once on all ranks."""
        slot = self._keep(position, everything=True)
        if slot is not None and self._shard_plan is not None:
            writer.begin(slot, position.step, self._shard_plan)

    def _check(self) -> None:
        """Raise `TaskError` where the optimizer keeps what cannot be kept; known after its first step. Local."""
        check_state(self._strategy.table, self._strategy.task.optimizer)
        if self._shard_plan is not None:
            self._shard_plan.values()
        self._checked = True

    def _keep(
        self, position: TrainProgress, buffers: dict[str, torch.Tensor] | None = None, *, everything: bool = False
    ) -> SnapshotBuffer | None:
        """Take a snapshot of this rank's share; where that cannot be, none are taken any more."""
        try:
            if not self._layouts and self._rank_snapshots is not None and buffers is None:
                self._weigh()
            if self._rank_snapshots is None and not everything:
                return None
            return self._take(position, buffers, everything=everything)
        except TaskError as error:
            if self._plan.checkpoint:
                raise
            self._forgo(str(error))
            return None

    def _forgo(self, reason: str) -> None:
        """Take no snapshots any more, but for those that go to disk."""
        self._rank_snapshots = self._step_guard = None
        instead = "go on from the last checkpoint" if self._plan.checkpoint else "begin anew"
        text = f"no snapshots are taken, so a lost rank means to {instead}: {reason}"
        self._tell(Noted(rank=self._rank, text=text))

    def _weigh(self) -> None:
        """Before the first snapshot: see whether there is memory for those of all ranks. **Collective**."""
        assert self._shard_plan is not None
        nbytes = sum(tensor.nbytes for tensor in self._shard_plan.changing().values())
        told = torch.tensor([float(nbytes)], dtype=torch.float64, device=self._strategy.device)
        self._axes.world.all_reduce_(told)
        needed, free = 2 * told.item(), available_bytes()
        told.fill_(float(free is not None and needed > free * _MEMORY_SHARE))
        self._axes.world.all_reduce_(told)  # one that takes none is enough for those of the others to be in vain
        if told.item():
            if self._rank_snapshots is not None:
                self._rank_snapshots.narrow()
            free_text = "" if free is None else f", of {free / 2**20:,.0f} MiB that are free"
            self._forgo(f"they need {needed / 2**20:,.0f} MiB{free_text}.")

    def _take(
        self, position: TrainProgress, buffers: dict[str, torch.Tensor] | None = None, *, everything: bool = False
    ) -> SnapshotBuffer:
        """Take a snapshot of this rank's share; returns where it lies.

        Raises:
            TaskError: It holds what cannot be kept.
        """
        assert self._spool is not None
        assert self._shard_plan is not None
        started_s = time.monotonic()
        if not self._checked:
            self._check()
        tensors = self._shard_plan.changing(buffers=everything)
        layout = self._layout_of(tensors)
        generators = rng.state_dict() if buffers is None else None  # after an error nobody knows
        text = self._text(position, generators, self._shard_plan)
        if buffers is not None:
            tensors = {key: buffers.get(key.rsplit("|", 4)[0], tensor) for key, tensor in tensors.items()}
        slot = self._spool.write(position.moment, self._ranks, layout, tensors, text)
        self._kept_at = position.step
        now = time.monotonic()
        self._snapshot_due_s = now + _SHARE * (now - started_s)
        return slot

    def _layout_of(self, tensors: dict[str, torch.Tensor]) -> TensorLayout:
        layout = next((known for known in self._layouts if known.fits(tensors)), None)
        if layout is not None:
            return layout
        layout = TensorLayout(tensors)
        self._layouts = [*self._layouts[-1:], layout]
        return layout

    def _text(self, position: TrainProgress, generators: list[Any] | None, pieces: ShardPlan) -> str:
        strategy, plan = self._strategy, self._plan
        told: dict[str, Any] = {
            "rank": self._rank,
            "mesh": str(plan.mesh),
            "reports_loss": self._axes.reports_loss,
            "plan": {name: getattr(plan, name) for name in ORDER},
            "position": position.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "precision": strategy.precision.state_dict(),
            "generators": generators,
            **pieces.values(),
        }
        return f'{{"tensors":{self._described},{json.dumps(told)[1:]}'
