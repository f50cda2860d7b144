"""Where the ranks stand: on which line each is, in which collective, and who waits for whom."""

from __future__ import annotations

import functools
import linecache
import os
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdist.cluster.engines.engine import Engine
from nbdist.cluster.launch import fork_server
from nbdist.engine import parent_watch, stack_dump
from nbdist.engine.cell_sources import NotebookUpdate, install
from nbdist.engine.stack_frames import frame_text, is_ours, is_users, place_of
from nbdist.errors import ranks_text
from nbdist.telemetry.host import host_id

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines

__all__ = ["RankWhere", "Where"]

_TORCHS = os.path.join("torch", "distributed", "distributed_c10d.py")
_WRAPS = os.path.join("torch", "nn", "parallel", "distributed.py")
_PAIRS = {"send", "recv", "receive", "isend", "irecv", "batch_isend_irecv"}
"""What meets another one of these, and no equal."""
_STARTS = (fork_server.__file__, parent_watch.__file__)
"""What stands below everything that an engine does."""


@dataclass(frozen=True, kw_only=True)
class RankWhere:
    """Where one rank stands.

    Args:
        rank: Which.
        state: "working", "waiting" (in a collective), "idle", "stopped" (its process is, by a signal), "silent" (it
            does not answer), "elsewhere" (on a host that cannot be asked) or "lost".
        step: How many steps of a training it has told of; None without one.
        collective: In which it is, such as "all_reduce"; else empty.
        frames: What its main thread is doing, outermost first.
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
        """The innermost line of the user's code, such as ``Cell In[5], line 3``; empty where there is none."""
        users = self.users
        return place_of(users[-1]) if users else ""

    @property
    def text(self) -> str:
        """For people: the user's frames with their source, then the innermost of all."""
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
    """Where all ranks stand.

    Args:
        ranks: Each of them, in order.
    """

    ranks: tuple[RankWhere, ...]

    @classmethod
    def of(cls, engines: Engines, run: Any, cells: Mapping[str, tuple[str, str]]) -> Where:
        """Ask them all; what they do is not disturbed. Local to the notebook.

        Args:
            engines: Which.
            run: The run that they work on, if there is one.
            cells: What a user calls each cell that ran on engines, and its source, by the name of its file there.
        """
        here = host_id()
        found = []
        for engine in engines.records():
            state = None if run is None else run.progress.ranks.get(engine.rank)  # it may just be joining the run
            step = None if state is None else state.step
            found.append(_asked(engine, here, step, cells))
        return cls(ranks=tuple(found))

    @property
    def verdict(self) -> str:
        """In one sentence who waits for whom, and where those stand."""
        if not self._by_state("working", "waiting"):
            return (
                f"all {len(self.ranks)} ranks are idle"
                if len(self._by_state("idle")) == len(self.ranks)
                else self._behind()
            )
        waiting = self._by_state("waiting")
        if not waiting:
            return f"no rank waits for another; {self._behind()}"
        met: dict[str, list[int]] = {}
        for rank in waiting:
            met.setdefault(f"{rank.collective}{f' ({rank.place})' if rank.place else ''}", []).append(rank.rank)
        spread = ", ".join(f"{ranks_text(ranks)} in {collective}" for collective, ranks in met.items())
        if len(waiting) < len(self.ranks):
            who = ranks_text(rank.rank for rank in waiting)
            verb = "waits" if len(waiting) == 1 else "wait"
            whom = "it" if len(self.ranks) - len(waiting) == 1 else "them"
            there = f" in {next(iter(met))}" if len(met) == 1 else f": {spread}"
            return f"{self._behind()}; {who} {verb} for {whom}{there}"
        if len(met) == 1:
            return f"all ranks are in {next(iter(met))}"
        if self._may_meet():
            return f"all ranks wait for each other: {spread}"
        return f"the ranks are in different collectives, and wait for ever if they stay there: {spread}"

    @property
    def hopeless(self) -> bool:
        """Whether ranks wait for others that have nothing left to do, or are in another collective."""
        waiting, idle = self._by_state("waiting"), self._by_state("idle")
        return bool(waiting) and len(waiting) + len(idle) == len(self.ranks) and (bool(idle) or not self._may_meet())

    def _may_meet(self) -> bool:
        """Whether those that wait may do so for each other."""
        collectives = {rank.collective for rank in self._by_state("waiting")}
        return len(collectives) == 1 or collectives <= _PAIRS

    def among(self, ranks: Iterable[int]) -> Where:
        """The same of these ranks alone."""
        wanted = set(ranks)
        return Where(ranks=tuple(rank for rank in self.ranks if rank.rank in wanted))

    def _behind(self) -> str:
        words = {
            "working": "is", "idle": "does nothing", "lost": "is lost (its process has ended)",
            "stopped": "does nothing, for its process is stopped (SIGSTOP)", "silent": "does not answer",
            "elsewhere": "cannot be asked, for it is on another host",
        }  # fmt: skip
        said = []
        for rank in self.ranks:
            if rank.state == "waiting":
                continue
            at = ""
            if rank.state == "working":
                frame = (rank.users or rank.frames)[-1]
                at = f" at {place_of(frame)}, in {frame.name}"
            said.append(f"rank {rank.rank} {words[rank.state]}{at}")
        return ", ".join(said)

    def _by_state(self, *states: str) -> list[RankWhere]:
        return [rank for rank in self.ranks if rank.state in states]

    def __str__(self) -> str:
        return "\n\n".join([self.verdict, *(rank.text for rank in self.ranks if rank.state != "idle")])

    __repr__ = __str__


def _asked(engine: Engine, here: str, step: int | None, cells: Mapping[str, tuple[str, str]]) -> RankWhere:
    rank = engine.rank
    if engine.state == "lost":
        return RankWhere(rank=rank, state="lost", step=step)
    if engine.host_id != here or not engine.stacks:
        return RankWhere(rank=rank, state="elsewhere", step=step)
    answer = stack_dump.ask(engine.pid, engine.stacks, engine.main_thread)
    if answer is None:
        return RankWhere(rank=rank, state="stopped" if stack_dump.is_stopped(engine.pid) else "silent", step=step)
    sources = {f.filename: cells[name] for f in answer if (name := os.path.basename(f.filename)) in cells}
    install(NotebookUpdate(sources=sources, path=[]))
    for frame in answer:
        linecache.checkcache(frame.filename)
    if not any(is_users(frame) or (is_ours(frame) and frame.filename not in _STARTS) for frame in answer):
        return RankWhere(rank=rank, state="idle", step=step)
    collective = next(filter(None, map(_collective, answer)), "")
    return RankWhere(
        rank=rank, state="waiting" if collective else "working", step=step, collective=collective, frames=tuple(answer)
    )


def _collective(frame: traceback.FrameSummary) -> str:
    """The collective, if this frame is one's."""
    if frame.filename.endswith(_TORCHS):
        return frame.name
    if frame.filename.endswith(_WRAPS):
        return "DistributedDataParallel"
    return _waiting_calls().get((frame.filename, frame.name), "")


@functools.cache
def _waiting_calls() -> dict[tuple[str, str], str]:
    """See there; it stands on torch, which is loaded where engines run, and not where this module is."""
    from nbdist.core.comm.waiting import waiting_calls

    return waiting_calls()
