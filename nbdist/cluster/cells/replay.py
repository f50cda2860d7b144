"""Replay: a replacement engine runs every cell and gets every pushed value that its rank had, in order, once.

So all cells and pushes to ranks go through here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from nbdist.cluster.calls.pending_call import PendingCall
from nbdist.cluster.cells.cell_run import CellRun
from nbdist.cluster.diagnose.where import Where
from nbdist.cluster.engines.engines import Engines
from nbdist.core.transfer.payload import Payload, Segment, SegmentCache, pack
from nbdist.engine.follow.cell_sources import class_marks
from nbdist.engine.follow.changes import NotebookChanges, NotebookUpdate
from nbdist.errors import ClusterError, EngineError
from nbdist.upstream.ipython_private import cell_file

__all__ = ["Replay"]

_PUSHED_BYTES, _PUSHES = 1 << 30, 256
"""Budget of pushed values, in bytes and in open files; above it, those that later pushes supersede are dropped."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A cell or a push that ranks have run.

    Args:
        name: Its name in warnings.
        ranks: The ranks that ran it.
        call: The function of `remote_calls` that does it, or prepares the cell, and its arguments after the update.
        changes: How many changes of the notebook came before it.
        cell: The cell's source, if it is one.
        everyone: Whether all ranks ran it: then ranks added later run it too.
        names: The names that a push assigns.
        segment: The memory that holds a push's values.
    """

    name: str
    ranks: frozenset[int]
    call: tuple[str, tuple[Any, ...]]
    changes: int
    cell: str | None = None
    everyone: bool = False
    names: frozenset[str] = frozenset()
    segment: Any = None

    def start(self, engines: Engines, rank: int, update: NotebookUpdate) -> PendingCall:
        """Start it on one rank."""
        function, arguments = self.call
        arguments = tuple(engines.payloads.place(a, [rank])[rank] if isinstance(a, Payload) else a for a in arguments)
        call = engines.start_call(rank, function, update, *arguments)
        return call if self.cell is None else engines.start_cell(rank, self.cell)


class Replay:
    """Runs cells and pushes on ranks, and records them for replacement engines.

    Attributes:
        cells: Label and source of each cell that ran on engines, by the name of its file there.
    """

    def __init__(self) -> None:
        self._engines: Engines
        self._changes: NotebookChanges
        self._entries: list[_Entry] = []
        self._known_processes: dict[int, tuple[str, str]] = {}
        self.cells: dict[str, tuple[str, str]] = {}

    def follow(self, engines: Engines, changes: NotebookChanges) -> None:
        """Use these new engines from now on, which have run nothing yet; they get these changes of the notebook."""
        self._engines, self._changes, self._known_processes = engines, changes, {}

    def _update(self, ranks: Iterable[int], count: int | None = None) -> NotebookUpdate:
        processes = self._engines.processes
        return self._changes.update([processes[rank] for rank in ranks], count)

    def _forget(self, ranks: Iterable[int]) -> None:
        """These ranks may not have got the last update."""
        processes = self._engines.processes
        self._changes.forget(processes[rank] for rank in ranks if rank in processes)

    def run_cell(self, source: str, number: int | None, ranks: list[int]) -> CellRun:
        """Start a cell on ranks; `number` is its In[...] in tracebacks."""
        first_line = source.strip().partition("\n")[0]
        name = f"the cell {first_line!r}" if number is None else f"Cell In[{number}]"
        only_ranks = ranks if len(ranks) < self._engines.size else None
        self.cells[cell_file(source)] = name, source
        call = "prepare_cell", (number, only_ranks)
        entry = _Entry(name=name, ranks=frozenset(ranks), call=call, cell=source, changes=self._changes.look())
        update, size = self._update(ranks), self._engines.size

        def note(done: list[int]) -> None:
            self._forget(set(ranks) - set(done))
            if done:
                self._record(replace(entry, ranks=frozenset(done), everyone=len(done) == size))

        return self._follow({rank: entry.start(self._engines, rank, update) for rank in ranks}, note)

    def push(self, values: dict[str, Any]) -> None:
        """Assign values in the namespace of all ranks' cells; all ranks map one shared copy of the tensors."""
        engines = self._engines
        ranks, names = frozenset(range(engines.size)), frozenset(values)
        payload, segment = pack(
            values, names=values, by_file=engines.share_memory, segment_cache=SegmentCache(engines.anchor)
        )
        changes = self._changes.look()
        try:
            update, placed = self._update(ranks), engines.payloads.place(payload, ranks)
            engines.call(ranks, "push", {rank: (update, placed[rank]) for rank in ranks})
        except BaseException:
            self._forget(ranks)
            engines.payloads.release(payload)
            segment.close()
            raise
        name = f"the push of {', '.join(values)}"
        self._record(
            _Entry(
                name=name,
                ranks=ranks,
                call=("push", (payload,)),
                changes=changes,
                everyone=True,
                names=names,
                segment=segment,
            )
        )
        while self._over_budget() and (old := self._superseded()) is not None:
            self._entries.remove(old)
            self._free(old)

    def pull(self, name: str, rank: int) -> Any:
        """Get the value of a name from the namespace of one rank's cells.

        Raises:
            ClusterError: The name is not defined there.
        """
        engines = self._engines
        try:
            return engines.payloads.open(engines.call([rank], "pull", (name, engines.share_memory))[rank], rank)
        except EngineError as error:
            if "NameError" in str(error):
                raise ClusterError(f"{name!r} is not defined on rank {rank}.") from None
            raise

    def tie(self, namespace: dict[str, Any], ranks: list[int]) -> None:
        """Give the cells' classes the cloudpickle ids that they have in the notebook's namespace."""
        marks = class_marks(namespace)
        changes = self._changes.count
        self._engines.call(ranks, "tie", (self._update(ranks), marks))
        everyone = len(ranks) == self._engines.size
        entry = _Entry(name="the classes", ranks=frozenset(ranks), call=("tie", (marks,)), changes=changes)
        self._record(replace(entry, everyone=everyone))

    def take_over(self, engines: Engines, changes: NotebookChanges) -> None:
        """Load the entries that another kernel has left at the anchor, and continue with its changes."""
        anchor = engines.anchor
        assert anchor is not None
        notes = anchor.state()["notes"]
        entries, self._known_processes, self.cells = notes.get("replay", ([], engines.processes, {}))
        self._engines, self._changes = engines, changes
        self._entries = [
            replace(entry, segment=entry.segment and Segment(1, anchor, entry.segment)) for entry in entries
        ]

    def _record(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self._note()

    def _note(self) -> None:
        """Save the entries at the anchor, for the next kernel."""
        self._changes.save(self._engines.anchor)
        if self._engines.anchor is not None:
            # Segments as paths: an open file cannot be pickled.
            plain = [replace(entry, segment=entry.segment and entry.segment.path) for entry in self._entries]
            self._engines.anchor.note("replay", (plain, self._known_processes, self.cells))

    def catch_up(self) -> bool:
        """Run pending entries on engines that took ranks since the last call; returns whether there were any.

        They leave the world first: without the other ranks a collective would hang, so it must raise. So a world has to
        be formed afterwards. An entry that fails is named in a warning; the others run.

        Raises:
            ClusterError: The engines cannot be reached any more.
            EngineError: An engine was lost meanwhile.
            KeyboardInterrupt: It was interrupted. The next call runs all pending entries again.
        """
        engines, now = self._engines, self._engines.processes
        new = {rank for rank, process in now.items() if self._known_processes.get(rank) != process}
        self._entries = [replace(e, ranks=frozenset(now)) if e.everyone else e for e in self._entries]
        pending = [entry for entry in self._entries if entry.ranks & new]
        if pending:
            engines.call(sorted(new), "leave")
            engines.dissolve()
            run_again = new.intersection(rank for entry in pending for rank in entry.ranks)
            self._changes.rewind(now[rank] for rank in run_again)  # each entry sees the notebook as it was
        for entry in pending:
            ranks = sorted(entry.ranks & new)
            calls = {rank: entry.start(engines, rank, self._update([rank], entry.changes)) for rank in ranks}
            try:
                self._follow(calls).wait()
            except EngineError as error:
                if engines.lost:
                    raise
                what = str(error).partition("\n")[0].rstrip(".")
                if "process group has not been init" in what:
                    what = "it calls a collective, which needs the other ranks"
                warnings.warn(
                    f"{entry.name} was run again on an engine that replaced a lost one, and failed: {what}. "
                    "Its definitions are missing there: run it again.", stacklevel=4,
                )  # fmt: skip
        if now != self._known_processes:
            self._known_processes = now
            self._note()
        return bool(pending)

    def clear(self) -> None:
        """Remove all entries, and free their memory."""
        for entry in self._entries:
            self._free(entry)
        self._entries.clear()

    def _free(self, entry: _Entry) -> None:
        """Free the values of a push, on all hosts."""
        if entry.segment is not None:
            for payload in entry.call[1]:
                self._engines.payloads.release(payload)
            entry.segment.close()

    def _follow(self, calls: dict[int, PendingCall], done: Callable[[list[int]], None] = lambda ranks: None) -> CellRun:
        engines = self._engines

        def where() -> Where:
            return Where.of(engines, None, self.cells)

        return CellRun(calls, engines.interrupt, engines.suspect, engines.check_alive, done, where)

    def _over_budget(self) -> bool:
        sizes = [entry.segment.size for entry in self._entries if entry.segment is not None]
        return len(sizes) > _PUSHES or sum(sizes) > _PUSHED_BYTES

    def _superseded(self) -> _Entry | None:
        """The oldest push all of whose names were pushed again later."""
        for number, entry in enumerate(self._entries):
            later = frozenset[str]().union(*(after.names for after in self._entries[number + 1 :]))
            if entry.names and entry.names <= later:
                return entry
        return None
