"""Stacks of all ranks: the line and collective each rank is in, and which ranks wait for which (deadlocks)."""

from __future__ import annotations

import functools
import linecache
import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdist.cluster.engines.engine_info import Engine
from nbdist.cluster.hosts import fork_server
from nbdist.cluster.hosts.host import Host
from nbdist.engine import parent_watch
from nbdist.engine.follow.cell_sources import add_cells
from nbdist.engine.stack_frames import frame_text, is_ours, is_users, place_of
from nbdist.errors import ranks_text

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines

__all__ = ["RankWhere", "Where"]

_C10D_FILE = os.path.join("torch", "distributed", "distributed_c10d.py")
_DDP_FILE = os.path.join("torch", "nn", "parallel", "distributed.py")
_NO_STEP_FILES = (
    *(f"{os.sep}{name}.py" for name in ("bdb", "pdb")),
    *(os.path.join("nbdist", "core", "state", f"{name}.py") for name in ("checkpoint_writer", "snapshotter")),
)
"""Files of a debugger, and of what writes checkpoints."""
_POINT_TO_POINT = {"send", "recv", "receive", "isend", "irecv", "batch_isend_irecv"}
"""Calls that match another one of these, not the same one."""
_BASE_FILES = (fork_server.__file__, parent_watch.__file__)
"""Files whose frames are at the base of every engine's stack."""


@dataclass(frozen=True, kw_only=True)
class RankWhere:
    """The stack of one rank.

    Args:
        rank: The rank.
        state: "working", "waiting" (in a collective), "idle", "stopped" (its process, by SIGSTOP), "silent" (does not
            answer), "elsewhere" (on a host without stack dumps) or "lost".
        step: The last step of a run that it reported; None without a run.
        collective: The collective that it is in, such as "all_reduce"; else empty.
        frames: The stack of its main thread, outermost first.
    """

    rank: int
    state: str
    step: int | None = None
    collective: str = ""
    frames: tuple[traceback.FrameSummary, ...] = ()

    @property
    def users(self) -> list[traceback.FrameSummary]:
        """The frames of the user's code, outermost first."""
        return [frame for frame in self.frames if is_users(frame)]

    @property
    def place(self) -> str:
        """The innermost line of the user's code, such as ``Cell In[5], line 3``; empty if there is none."""
        users = self.users
        return place_of(users[-1]) if users else ""

    @property
    def text(self) -> str:
        """For display: the user's frames with their source, then the innermost of all."""
        doing = {"waiting": f"waits in {self.collective}", "stopped": "its process is stopped (SIGSTOP)"}
        step = "" if self.step is None else f", at step {self.step:,} or later"
        lines = [f"rank {self.rank}: {doing.get(self.state, self.state)}{step}"]
        users = self.users
        lines += [frame_text(frame) for frame in users]
        if self.state in ("working", "waiting") and self.frames and self.frames[-1] not in users:
            lines.append(f"{'inside ' if users else ''}{place_of(self.frames[-1])}, in {self.frames[-1].name}")
        return "\n  ".join("\n".join(lines).splitlines())


@dataclass(frozen=True, kw_only=True)
class Where:
    """The stacks of all ranks.

    Args:
        ranks: All ranks, in order.
    """

    ranks: tuple[RankWhere, ...]

    @classmethod
    def of(cls, engines: Engines, run: Any, cells: Mapping[str, tuple[str, str]]) -> Where:
        """Request the stack dumps of all engines, without disturbing them. Local to the notebook.

        Args:
            engines: The engines.
            run: Their current run, if there is one.
            cells: Label and source of each cell that ran on engines, by the name of its file there.
        """
        found = []
        for engine in engines.records():
            state = None if run is None else run.progress.ranks.get(engine.rank)  # None while it is joining the run
            step = None if state is None else state.step
            found.append(_rank_where(engine, engines.host_of(engine), step, cells))
        return cls(ranks=tuple(found))

    @property
    def verdict(self) -> str:
        """One sentence: which ranks wait for which, and where those are."""
        if not self._by_state("working", "waiting"):
            return (
                f"all {len(self.ranks)} ranks are idle"
                if len(self._by_state("idle")) == len(self.ranks)
                else self._others_text()
            )
        waiting = self._by_state("waiting")
        if not waiting:
            return f"no rank waits for another; {self._others_text()}"
        collectives: dict[str, list[int]] = {}
        for rank in waiting:
            collectives.setdefault(f"{rank.collective}{f' ({rank.place})' if rank.place else ''}", []).append(rank.rank)
        spread = ", ".join(f"{ranks_text(ranks)} in {collective}" for collective, ranks in collectives.items())
        if len(waiting) < len(self.ranks):
            who = ranks_text(rank.rank for rank in waiting)
            verb = "waits" if len(waiting) == 1 else "wait"
            whom = "it" if len(self.ranks) - len(waiting) == 1 else "them"
            there = f" in {next(iter(collectives))}" if len(collectives) == 1 else f": {spread}"
            return f"{self._others_text()}; {who} {verb} for {whom}{there}"
        if len(collectives) == 1:
            return f"all ranks are in {next(iter(collectives))}"
        if self._may_match():
            return f"all ranks wait for each other: {spread}"
        return f"the ranks are in different collectives, and wait for ever if they stay there: {spread}"

    @property
    def deadlocked(self) -> bool:
        """Whether ranks wait for ranks that are idle, or in another collective."""
        waiting, idle = self._by_state("waiting"), self._by_state("idle")
        return bool(waiting) and len(waiting) + len(idle) == len(self.ranks) and (bool(idle) or not self._may_match())

    @property
    def stuck(self) -> bool:
        """Whether no rank computes: all wait for each other, be it in one collective, or for ranks that are idle."""
        return self.deadlocked or len(self._by_state("waiting")) == len(self.ranks) > 0

    @property
    def interrupted(self) -> bool:
        """Whether a rank is in a debugger, or writes or awaits a checkpoint: however long that takes."""
        return any(frame.filename.endswith(_NO_STEP_FILES) for rank in self.ranks for frame in rank.frames)

    def _may_match(self) -> bool:
        """Whether the calls that ranks wait in can match: one collective, or only point-to-point calls."""
        collectives = {rank.collective for rank in self._by_state("waiting")}
        return len(collectives) == 1 or collectives <= _POINT_TO_POINT

    def among(self, ranks: Iterable[int]) -> Where:
        """The stacks of some ranks only."""
        wanted = set(ranks)
        return Where(ranks=tuple(rank for rank in self.ranks if rank.rank in wanted))

    def _others_text(self) -> str:
        texts = {
            "working": "is", "idle": "does nothing", "lost": "is lost (its process has ended)",
            "stopped": "does nothing, for its process is stopped (SIGSTOP)", "silent": "does not answer",
            "elsewhere": "cannot be asked, for it is on another host",
        }  # fmt: skip
        parts = []
        for rank in self.ranks:
            if rank.state == "waiting":
                continue
            place = ""
            if rank.state == "working":
                frame = (rank.users or rank.frames)[-1]
                place = f" at {place_of(frame)}, in {frame.name}"
            parts.append(f"rank {rank.rank} {texts[rank.state]}{place}")
        return ", ".join(parts)

    def _by_state(self, *states: str) -> list[RankWhere]:
        return [rank for rank in self.ranks if rank.state in states]

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *(rank.text for rank in self.ranks if rank.state != "idle")])

    __repr__ = __str__


def _rank_where(
    engine: Engine, host: Host | None, step: int | None, cells: Mapping[str, tuple[str, str]]
) -> RankWhere:  # fmt: skip
    rank = engine.rank
    if engine.state == "lost":
        return RankWhere(rank=rank, state="lost", step=step)
    if host is None or not engine.stacks:
        return RankWhere(rank=rank, state="elsewhere", step=step)
    frames, stopped = host.stack(engine.mark, engine.stacks)
    if frames is None:
        return RankWhere(rank=rank, state="stopped" if stopped else "silent", step=step)
    sources = {f.filename: cells[name] for f in frames if (name := os.path.basename(f.filename)) in cells}
    add_cells(sources)
    for frame in frames:
        linecache.checkcache(frame.filename)
    if not any(is_users(frame) or (is_ours(frame) and frame.filename not in _BASE_FILES) for frame in frames):
        return RankWhere(rank=rank, state="idle", step=step)
    collective = next(filter(None, map(_collective, frames)), "")
    return RankWhere(
        rank=rank, state="waiting" if collective else "working", step=step, collective=collective, frames=tuple(frames)
    )


def _collective(frame: traceback.FrameSummary) -> str:
    """The collective whose call this frame is, or ""."""
    if frame.filename.endswith(_C10D_FILE):
        return frame.name
    if frame.filename.endswith(_DDP_FILE):
        return "DistributedDataParallel"
    return _waiting_calls().get((frame.filename, frame.name), "")


@functools.cache
def _waiting_calls() -> dict[tuple[str, str], str]:
    """See there. Imported here: it loads torch, which this module must not, but which running engines have loaded."""
    from nbdist.core.comm.blocking_calls import waiting_calls

    return waiting_calls()
