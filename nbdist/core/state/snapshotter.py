"""The snapshotter: when a rank takes snapshots in memory, writes checkpoints, and saves its state after an error."""

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
from nbdist.core.optim.lr_schedulers import Schedulers
from nbdist.core.params.replicas import check_replicas
from nbdist.core.params.weight_copies import COPIES, WeightCopies
from nbdist.core.process import rng
from nbdist.core.state.checkpoint_writer import CheckpointWriter, prepare
from nbdist.core.state.extra_states import ExtraStates
from nbdist.core.state.folder_lease import Lease
from nbdist.core.state.replica import Replica
from nbdist.core.state.restore import SAMPLE_ORDER_OPTIONS
from nbdist.core.state.shard_plan import ShardPlan, check_state, gather_texts
from nbdist.core.state.snapshot import RankSnapshots, SnapshotBuffer, SnapshotStore
from nbdist.core.state.step_guard import StepGuard
from nbdist.core.state.tensor_buffer import TensorLayout
from nbdist.core.state.train_progress import TrainProgress
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.errors import NbdistError, TaskError
from nbdist.plan import Plan, available_bytes
from nbdist.telemetry import Checkpointed, Event, Noted

__all__ = ["Snapshotter"]

_SNAPSHOT_INTERVAL_FACTOR = 200
"""Time between snapshots, as a multiple of how long the last one took."""
_MEMORY_SHARE = 0.5
"""The part of the free memory that snapshots of all ranks may take."""


class Snapshotter:
    """Takes snapshots of this rank's shards, and writes checkpoints from them. **Collective**: the constructor (world).

    Rank 0 decides when: it sets a flag in the gradient sync of a step, so all ranks save the state after that same
    step, without a collective of their own.

    Args:
        strategy: Holds the model, with its parameters placed.
        plan: Its `checkpoint` options.
        schedulers: Saved too.
        rank_snapshots: Where snapshots go; None to take none.
        emit: Called with events for the user.
        extra: The modules' extra states, saved too.
        run_id: The run's id.
        lease: Of the plan's checkpoint folder, on rank 0.
        copies: See `ShardPlan`.
        changed: See `ShardPlan`.

    Attributes:
        replica: This rank's, if there are snapshots or checkpoints.
    """

    def __init__(
        self, strategy: Strategy, plan: Plan, schedulers: Schedulers, rank_snapshots: RankSnapshots | None,
        emit: Callable[[Event], None], extra: ExtraStates, copies: WeightCopies, run_id: str = "",
        lease: Lease | None = None, changed: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._strategy = strategy
        self._plan = plan
        self._schedulers = schedulers
        self._rank_snapshots = rank_snapshots
        self._step_record = rank_snapshots  # records each completed step, even after snapshots are disabled
        self._buffers = rank_snapshots  # checkpoints pass through them too, or through a store of this rank's own
        self._emit = emit
        self._changed = changed
        self._extra = extra
        self._copies = copies
        self._run_id = run_id
        self._leases: dict[str, Lease | None] = {}  # of folders of "checkpoint" commands, until the end of the run
        self._axes: MeshChannels = strategy.axes
        self._rank, self._ranks = strategy.axes.world.rank, strategy.axes.world.size
        self._shard_plan: ShardPlan | None = None
        self.replica: Replica | None = None
        self._own_store: SnapshotStore | None = None
        self._writer: CheckpointWriter | None = None  # the one used last
        self._planned_writer: CheckpointWriter | None = None
        if rank_snapshots is not None or plan.checkpoint:
            self._open()
        if plan.checkpoint:
            self._writer = self._planned_writer = self._make_writer(plan.checkpoint, plan.checkpoint_keep, lease)
        self._checked = False
        self._layouts: list[TensorLayout] = []
        self._last_snapshot_step = -1
        self._snapshot_due_s = 0.0
        self._every_steps, self._every_s = plan.checkpoint_cadence
        self._checkpoint_due_s = time.monotonic() + (self._every_s or 0.0)
        self._checkpoint_due = False
        self._step_guard = StepGuard(strategy.task.model) if rank_snapshots is not None else None

    def _open(self) -> None:
        """Plan this rank's shards, and create a buffer for checkpoints if there is none. **Collective** (world)."""
        if self._shard_plan is None:
            task, strategy = self._strategy.task, self._strategy
            self._shard_plan = ShardPlan(
                task.model, strategy.table, task.optimizers, strategy.axes, self._copies, self._changed
            )
            self._described = json.dumps(self._shard_plan.described)
            self.replica = Replica(task, self._shard_plan, self._ranks)
        if self._buffers is None:
            self._own_store = SnapshotStore(1)
            self._buffers = RankSnapshots(self._own_store.paths[0])

    def _make_writer(self, folder: str, keep: int, lease: Lease | None) -> CheckpointWriter:
        mark = self._axes.world.broadcast_bytes(secrets.token_hex(4).encode()).decode()
        return CheckpointWriter(folder, keep, mark, self._rank, self._ranks, lease)

    def flags(self, progress: TrainProgress) -> ControlFlags:
        """This rank's flags for the step that begins at `progress`, those of this class only. Local."""
        writer = self._writer
        if self._rank_snapshots is None and writer is None:
            return NO_FLAGS
        self._report_checkpoints()
        done = writer is not None and writer.done
        failed = writer is not None and writer.failed
        flags = ControlFlags(written=done and not failed, unwritten=done and failed)
        if self._rank:
            return flags
        now = time.monotonic()
        if self._planned_writer is not None:
            self._checkpoint_due |= bool(self._every_steps) and (progress.step + 1) % self._every_steps == 0
            self._checkpoint_due |= bool(self._every_s) and now >= self._checkpoint_due_s
        return flags._replace(
            snapshot=self._rank_snapshots is not None and now >= self._snapshot_due_s,
            checkpoint=self._checkpoint_due and not (writer and writer.working),
        )

    def begin_update(self) -> None:
        """Call before weights or state change. Local."""
        if self._step_guard is not None:
            self._step_guard.begin_update()

    def end_step(self, progress: TrainProgress, agreed: ControlFlags | None) -> None:
        """Call after a step or an epoch, with all ranks' summed flags, on all ranks after the same step.

        **Collective** over ``dp`` where a checkpoint is due, else local.
        """
        if self._step_guard is not None:
            self._step_guard.end_step()
        if self._step_record is not None:
            self._step_record.record_step(progress.step)
        if agreed is None:
            return
        if self._planned_writer is not None and not self._checked:
            self._check_optimizers()
        if progress.step - self._strategy.lag <= self._last_snapshot_step:
            return  # with a lag, these flags were sent before the last snapshot, which has fulfilled them
        if self._writer is not None and self._writer.busy and agreed.written + agreed.unwritten == self._ranks:
            self._finish_checkpoint(agreed.unwritten == 0)
        if agreed.checkpoint and self._planned_writer is not None:
            self._checkpoint_due, self._checkpoint_due_s = False, time.monotonic() + (self._every_s or 0.0)
            self._writer = self._planned_writer
            self._write(self._writer, progress)
        elif agreed.snapshot and self._rank_snapshots is not None:
            self._try_snapshot(progress)

    def write_checkpoint(self, progress: TrainProgress, folder: str) -> None:
        """Start writing a checkpoint that the user asked for; emits a note if a rank cannot. **Collective** (world)."""
        world = self._axes.world
        self.wait_for_checkpoint()
        self._check_replicas(progress)
        problem, buffer = "", None
        folder = world.broadcast_bytes(self._canonical_folder(folder).encode()).decode()
        try:
            if folder == self._plan.checkpoint and self._planned_writer is not None:
                self._writer = self._planned_writer
            else:
                if folder not in self._leases:
                    self._leases[folder] = prepare(folder, self._strategy.task.optimizers, world, self._run_id)
                self._writer = self._make_writer(folder, sys.maxsize, self._leases[folder])
            self._open()
            buffer = self._snapshot(progress, for_checkpoint=True)
        except NbdistError as error:
            problem = str(error)
        problems = [text for text in gather_texts(problem, world) if text]
        if buffer is not None and not problems and self._writer is not None and self._shard_plan is not None:
            self._writer.begin(buffer, progress.step, self._shard_plan, frozen=self._plan.checkpoint_frozen)
        for text in problems[:1]:
            self._emit(Noted(rank=self._rank, text=f"no checkpoint was written, the run continues: {text}"))

    def _canonical_folder(self, folder: str) -> str:
        """The name under which this run already leases a folder: its own lease must not look like a rival's. Local."""
        for name in [*([self._plan.checkpoint] if self._planned_writer is not None else []), *self._leases]:
            with contextlib.suppress(OSError):
                if os.path.samefile(name, folder):
                    return name
        return folder

    def wait_for_checkpoint(self) -> None:
        """Wait until a checkpoint in progress is published or has failed. **Collective** over the world."""
        if self._writer is None:
            return
        if self._writer.busy:
            self._finish_checkpoint_together()
        self._writer.wait()
        self._report_checkpoints()

    def finish(self, progress: TrainProgress) -> None:
        """Save the final state, to disk if there is a folder. **Collective** over the world."""
        self.wait_for_checkpoint()
        if self._planned_writer is not None:
            self._writer = self._planned_writer
            self._write(self._writer, progress)
            self.wait_for_checkpoint()
        elif self._rank_snapshots is not None:
            self._try_snapshot(progress)
        if self._writer is not None:
            # A barrier: after it, every rank can read the checkpoint.
            self._axes.world.all_reduce_(torch.ones(1, device=self._strategy.device))

    def snapshot_on_error(self, progress: TrainProgress) -> None:
        """After an error: snapshot the state after the last complete step, if this rank still has it. Local."""
        guard, plan = self._step_guard, self._shard_plan
        if guard is None or not progress.step or not guard.intact:
            return
        self._strategy.restore_shards()
        # The guard does not see whether the failed step has changed frozen parameters, or extra states.
        if not (self._extra.any or (plan is not None and plan.frozen_changed())):
            alone = self.replica is not None and self.replica.stands_alone(progress)
            self._try_snapshot(progress, guard.buffers, alone=alone)

    def frozen_stay(self) -> bool:
        """Whether parameters that are not trained have their first values on all ranks. **Collective** (world)."""
        plan = self._shard_plan
        own = torch.tensor([float(plan is None or plan.frozen_changed())], device=self._strategy.device)
        self._axes.world.all_reduce_(own)
        return not own.item()

    def close(self) -> None:
        """Wait for this rank's write in progress, and release leases. Local, twice is fine."""
        if self._writer is not None:
            self._writer.wait()
        for lease in self._leases.values():
            if lease is not None:
                lease.release()
        if self._own_store is not None:
            self._own_store.close()
        if self._shard_plan is not None:
            self._shard_plan.close()

    def _finish_checkpoint_together(self) -> None:
        """Wait until all ranks have written the checkpoint in progress, or one has failed. **Collective**."""
        assert self._writer is not None
        self._writer.wait()
        failed = torch.tensor([float(self._writer.failed)], device=self._strategy.device)
        self._axes.world.all_reduce_(failed)
        self._finish_checkpoint(not failed.item())
        self._writer.wait()

    def _finish_checkpoint(self, complete: bool) -> None:
        assert self._writer is not None
        self._report_checkpoints()
        self._writer.finish(complete)

    def _report_checkpoints(self) -> None:
        """Emit events for published and failed checkpoints."""
        writer = self._writer
        while writer is not None and writer.problems:
            self._emit(Noted(rank=self._rank, text=writer.problems.pop(0)))
        while writer is not None and writer.completed:
            step, path, seconds = writer.completed.pop(0)
            self._emit(Checkpointed(rank=self._rank, step=step, path=path, seconds=seconds))

    def _write(self, writer: CheckpointWriter, progress: TrainProgress) -> None:
        """Start writing a checkpoint, on all ranks after the same step. **Collective** over ``dp``."""
        self._check_replicas(progress)
        buffer = self._try_snapshot(progress, for_checkpoint=True)
        if buffer is not None and self._shard_plan is not None:
            writer.begin(buffer, progress.step, self._shard_plan, frozen=self._plan.checkpoint_frozen)

    def _check_replicas(self, progress: TrainProgress) -> None:
        """Raise `TaskError` rather than save weights of which replicas have others. **Collective** over ``dp``."""
        check_replicas(self._strategy.table, self._axes, progress.step, buffers=False)

    def _check_optimizers(self) -> None:
        """Raise `TaskError` if an optimizer has state that cannot be saved; known after its first step. Local."""
        check_state(self._strategy.table, self._strategy.task.optimizers.values())
        if self._shard_plan is not None:
            self._shard_plan.values()
        self._checked = True

    def _try_snapshot(
        self, progress: TrainProgress, buffers: dict[str, torch.Tensor] | None = None, *, for_checkpoint: bool = False,
        alone: bool = False,
    ) -> SnapshotBuffer | None:  # fmt: skip
        """Take a snapshot of this rank's shards; if that is impossible, disable snapshots."""
        try:
            if not self._layouts and self._rank_snapshots is not None and buffers is None:
                self._check_memory()
            if self._rank_snapshots is None and not for_checkpoint:
                return None
            return self._snapshot(progress, buffers, for_checkpoint=for_checkpoint, alone=alone)
        except TaskError as error:
            if self._plan.checkpoint:
                raise
            self._disable_snapshots(str(error))
            return None

    def _disable_snapshots(self, reason: str) -> None:
        """Take no more snapshots, except for checkpoints."""
        self._rank_snapshots = self._step_guard = None
        instead = "resumes from its last checkpoint" if self._plan.checkpoint else "starts over"
        text = f"no snapshots are taken, so after the loss of a rank the run {instead}: {reason}"
        self._emit(Noted(rank=self._rank, text=text))

    def _check_memory(self) -> None:
        """Before the first snapshot: disable snapshots if all ranks' do not fit into memory. **Collective**."""
        assert self._shard_plan is not None
        nbytes = sum(tensor.nbytes for tensor in self._shard_plan.changing().values())
        total = torch.tensor([float(nbytes)], dtype=torch.float64, device=self._strategy.device)
        self._axes.world.all_reduce_(total)
        needed, free = 2 * total.item(), available_bytes()
        short = total.fill_(float(free is not None and needed > free * _MEMORY_SHARE))
        self._axes.world.all_reduce_(short)  # one rank without a snapshot makes those of the others useless
        if short.item():
            if self._rank_snapshots is not None:
                self._rank_snapshots.use_one_buffer()
            free_text = "" if free is None else f", of {free / 2**20:,.0f} MiB that are free"
            self._disable_snapshots(f"they need {needed / 2**20:,.0f} MiB{free_text}.")

    def _snapshot(
        self, progress: TrainProgress, buffers: dict[str, torch.Tensor] | None = None, *, for_checkpoint: bool = False,
        alone: bool = False,
    ) -> SnapshotBuffer:  # fmt: skip
        """Take a snapshot of this rank's shards, and if `alone` of its share of its replica; returns its buffer.

        Raises:
            TaskError: Some state cannot be saved.
        """
        assert self._buffers is not None
        assert self._shard_plan is not None
        started_s = time.monotonic()
        if not self._checked:
            self._check_optimizers()
        tensors = self._shard_plan.changing(buffers=for_checkpoint, alone=alone)
        layout = self._layout_of(tensors)
        generators = rng.state_dict() if buffers is None else None  # after an error they have advanced
        text = self._text(progress, generators, self._shard_plan, for_checkpoint=for_checkpoint, alone=alone)
        if buffers is not None:
            kept = {key: key.rsplit("|", 4)[:2] for key in tensors}
            tensors = {
                key: tensor if kept[key][1] in COPIES else buffers.get(kept[key][0], tensor)
                for key, tensor in tensors.items()
            }
        number = self.replica.number if alone and self.replica is not None else (0, 0)
        buffer = self._buffers.write(progress.moment, self._ranks, layout, tensors, text, number)
        self._last_snapshot_step = progress.step
        now = time.monotonic()
        self._snapshot_due_s = now + _SNAPSHOT_INTERVAL_FACTOR * (now - started_s)
        return buffer

    def _layout_of(self, tensors: dict[str, torch.Tensor]) -> TensorLayout:
        layout = next((known for known in self._layouts if known.fits(tensors)), None)
        if layout is not None:
            return layout
        layout = TensorLayout(tensors)
        self._layouts = [*self._layouts[-1:], layout]
        return layout

    def _text(
        self, progress: TrainProgress, generators: list[Any] | None, shard_plan: ShardPlan, *, for_checkpoint: bool,
        alone: bool,
    ) -> str:  # fmt: skip
        strategy, plan = self._strategy, self._plan
        state: dict[str, Any] = {
            "rank": self._rank,
            "mesh": str(plan.mesh),
            "reports_loss": self._axes.reports_loss,
            "plan": {name: getattr(plan, name) for name in SAMPLE_ORDER_OPTIONS},
            "position": progress.state_dict(),
            "schedulers": self._schedulers.state_dict(),
            "precision": strategy.precision.state_dict(),
            "generators": generators,
            **shard_plan.values(),
        }
        if for_checkpoint and not plan.checkpoint_frozen and (sums := shard_plan.frozen_sums()):
            state["left_out"] = sums
        if made := shard_plan.made():
            state["made"] = made
        if alone and self.replica is not None:
            state["replica"] = self.replica.metadata
        if self._extra.any:
            state["extra_state"] = self._extra.state_dict()
        if strategy.task.carried.any:
            state["carried"] = strategy.task.carried.state_dict(plan.slices)
        return f'{{"tensors":{self._described},{json.dumps(state)[1:]}'
