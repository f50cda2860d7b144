"""When a rank keeps the state of its training: in memory often, on disk as asked, and when an error ends it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from nbdist.core import seeds
from nbdist.core.axes import Axes
from nbdist.core.boundary import Boundary
from nbdist.core.checkpoint import CheckpointWriter
from nbdist.core.gradient_sync import Signals
from nbdist.core.image import Layout
from nbdist.core.pieces import Pieces, check_state
from nbdist.core.position import Position
from nbdist.core.restore import ORDER
from nbdist.core.schedulers import Scheduler
from nbdist.core.snapshot import Slot, Vault
from nbdist.core.strategies import Strategy
from nbdist.errors import TaskError
from nbdist.plan import Plan, available_bytes

__all__ = ["Keeper"]

_SHARE = 200
"""A snapshot is taken when the training has gone on this many times as long as the last one took."""
_MEMORY_SHARE = 0.5
"""Of the free memory that snapshots of all ranks may take."""


class Keeper:
    """Keeps what this rank has to keep. **Collective** over the world: the constructor.

    Rank 0 says when: it asks for a snapshot or a checkpoint in the gradient sync of a step, so all ranks keep the
    state after that same step, at no cost.

    Args:
        strategy: What is trained, placed.
        plan: How; its `checkpoint` options.
        scheduler: Kept too.
        vault: Where snapshots go; None for nowhere. A checkpoint is written from a snapshot.
        tell: Called with a sentence for people.
        changed: The buffers that are not as the task brought them.
    """

    def __init__(
        self, strategy: Strategy, plan: Plan, scheduler: Scheduler, vault: Vault | None, tell: Callable[[str], None],
        changed: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._strategy = strategy
        self._plan = plan
        self._scheduler = scheduler
        self._vault = vault
        self._tell = tell
        self._axes: Axes = strategy.axes
        self._rank, self._ranks = strategy.axes.world.rank, strategy.axes.world.size
        self._writer: CheckpointWriter | None = None
        if vault is not None:
            self._pieces = Pieces(strategy.task.model, strategy.table, strategy.task.optimizer, strategy.axes, changed)
            self._described = json.dumps(self._pieces.described)
        if plan.checkpoint and vault is not None:
            mark = strategy.axes.world.broadcast_bytes(secrets.token_hex(4).encode()).decode()
            self._writer = CheckpointWriter(plan.checkpoint, plan.checkpoint_keep, mark, self._rank, self._ranks)
        self._layouts: list[Layout] = []
        self._snapshot_due_s = 0.0
        self._every_steps, self._every_s = plan.checkpoint_cadence
        self._checkpoint_due_s = time.monotonic() + (self._every_s or 0.0)
        self._checkpoint_due = False
        self._boundary = Boundary(strategy.task.model) if vault is not None and plan.mesh.size == plan.mesh.dp else None

    def signals(self, position: Position) -> Signals:
        """What this rank has to say at the end of the step that begins at `position`; stop and exhausted are not its.

        Local.
        """
        if self._vault is None:
            return Signals()
        writer = self._writer
        done = writer is not None and writer.done
        failed = writer is not None and writer.failed
        said = Signals(written=done and not failed, unwritten=done and failed)
        if self._rank:
            return said
        now = time.monotonic()
        if writer is not None:
            self._checkpoint_due |= bool(self._every_steps) and (position.step + 1) % self._every_steps == 0
            self._checkpoint_due |= bool(self._every_s) and now >= self._checkpoint_due_s
        return said._replace(
            snapshot=now >= self._snapshot_due_s, checkpoint=self._checkpoint_due and not (writer and writer.working)
        )

    def leave_boundary(self) -> None:
        """Weights and state are about to change. Local."""
        if self._boundary is not None:
            self._boundary.leave()

    def reach_boundary(self, position: Position, heard: Signals | None) -> None:
        """A step is complete, or an epoch; `heard` is what all ranks have said in it. Local, at once on all ranks."""
        if self._vault is None:
            return
        if self._boundary is not None:
            self._boundary.reach()
        if heard is None:
            return
        if self._writer is not None and self._writer.busy and heard.written + heard.unwritten == self._ranks:
            self._settle(heard.unwritten == 0)
        if heard.checkpoint and self._writer is not None:
            self._checkpoint_due, self._checkpoint_due_s = False, time.monotonic() + (self._every_s or 0.0)
            slot = self._keep(position, everything=True)
            if slot is not None:
                self._writer.begin(slot, position.step, self._pieces.frozen())
        elif heard.snapshot:
            self._keep(position)

    def finish(self, position: Position) -> None:
        """Keep the last state, on disk too if there is a folder. **Collective** over the world."""
        if self._vault is None:
            return
        if self._writer is None:
            self._keep(position)
            return
        if self._writer.busy:
            self._settle_together()
        slot = self._keep(position, everything=True)
        if slot is not None:
            self._writer.begin(slot, position.step, self._pieces.frozen())
            self._settle_together()
        self._writer.wait()
        self._complain()
        self._axes.world.all_reduce_(torch.ones(1, device=self._strategy.device))  # it can be read from here on

    def rescue(self, position: Position) -> None:
        """After an error: keep the state of the last complete step, if this rank still has it. Local."""
        if self._boundary is not None and position.step and self._boundary.intact:
            self._keep(position, self._boundary.buffers)

    def close(self) -> None:
        """Let what is being written come to its end. Local, twice is fine."""
        if self._writer is not None:
            self._writer.wait()

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
        self._complain()
        self._writer.settle(whole)

    def _complain(self) -> None:
        while self._writer is not None and self._writer.problems:
            self._tell(self._writer.problems.pop(0))

    def _keep(
        self, position: Position, buffers: dict[str, torch.Tensor] | None = None, *, everything: bool = False
    ) -> Slot | None:
        """Take a snapshot of this rank's share; returns where it lies."""
        assert self._vault is not None
        started_s = time.monotonic()
        strategy = self._strategy
        try:
            if not self._layouts:
                check_state(strategy.table, strategy.task.optimizer)
            tensors = self._pieces.changing(buffers=everything)
            layout = self._layout_of(tensors)
            text = self._text(position, seeds.told() if buffers is None else None)  # after an error nobody knows
        except TaskError as error:
            if self._plan.checkpoint:
                raise
            self._vault = self._boundary = None
            self._tell(f"no snapshots are taken, so a lost rank means to begin anew: {error}")
            return None
        if buffers is not None:
            tensors = {key: buffers.get(key.rsplit("|", 4)[0], tensor) for key, tensor in tensors.items()}
        slot = self._vault.write(position.moment, self._ranks, layout, tensors, text)
        now = time.monotonic()
        self._snapshot_due_s = now + _SHARE * (now - started_s)
        return slot

    def _layout_of(self, tensors: dict[str, torch.Tensor]) -> Layout:
        layout = next((known for known in self._layouts if known.fits(tensors)), None)
        if layout is not None:
            return layout
        layout = Layout(tensors)
        needed, free = 2 * layout.data_bytes * self._ranks, available_bytes()
        if not self._layouts and not self._plan.checkpoint and free is not None and needed > free * _MEMORY_SHARE:
            raise TaskError(f"they need {needed / 2**20:,.0f} MiB, of {free / 2**20:,.0f} MiB that are free.")
        self._layouts = [*self._layouts[-1:], layout]
        return layout

    def _text(self, position: Position, generators: list[Any] | None) -> str:
        strategy, plan = self._strategy, self._plan
        told: dict[str, Any] = {
            "rank": self._rank,
            "mesh": str(plan.mesh),
            "speaks": self._axes.speaks,
            "plan": {name: getattr(plan, name) for name in ORDER},
            "position": position.told(),
            "scheduler": self._scheduler.told(),
            "precision": strategy.precision.told(),
            "generators": generators,
            **self._pieces.values(),
        }
        return f'{{"tensors":{self._described},{json.dumps(told)[1:]}'
