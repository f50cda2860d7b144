"""The replay: an engine that takes a rank gets every cell and pushed value that the rank had, in order, once.

So whatever is told to ranks outside of trainings goes through here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbdist.cluster.cells.cell_run import CellRun
from nbdist.cluster.diagnose.where import Where
from nbdist.cluster.engines.engines import Engines
from nbdist.core.transfer.payload import Segment, SegmentCache, pack, unpack
from nbdist.engine.cell_sources import NotebookUpdate, cell_file, search_path
from nbdist.errors import ClusterError, EngineError

__all__ = ["Replay"]

_PUSHED_BYTES, _PUSHES = 1 << 30, 256
"""How much pushed values may take, in memory and in open files, before those go that later ones have superseded."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Something that ranks were told.

    Args:
        name: What a user calls it.
        ranks: Which have done it.
        call: The function of an engine that does it, or comes before the cell, and its arguments.
        cell: The cell's source, if it is one.
        everyone: Whether all ranks that there were have.
        names: Those that it gives values to, if it is a push.
        segment: The memory in which the values lie.
    """

    name: str
    ranks: frozenset[int]
    call: tuple[str, tuple[Any, ...]]
    cell: str | None = None
    everyone: bool = False
    names: frozenset[str] = frozenset()
    segment: Any = None

    def begin(self, engines: Engines, rank: int) -> Any:
        """Let one rank do it; returns ipyparallel's result."""
        function, arguments = self.call
        called = engines.start_call(rank, function, *arguments)
        return called if self.cell is None else engines.start_cell(rank, self.cell)


class Replay:
    """Tells ranks what cells and pushes say, and keeps it for engines that take their places.

    Attributes:
        cells: What a user calls each cell that ran on engines, and its source, by the name of its file there.
    """

    def __init__(self) -> None:
        self._engines: Engines
        self._told: list[_Entry] = []
        self._knowing: dict[int, tuple[str, int, float]] = {}
        self.cells: dict[str, tuple[str, str]] = {}

    def follow(self, engines: Engines) -> None:
        """Tell these engines from now on; they know nothing yet."""
        self._engines, self._knowing = engines, {}

    def run_cell(self, source: str, number: int | None, ranks: list[int]) -> CellRun:
        """Begin to run a cell on ranks; `number` is its In[...] in tracebacks."""
        first_line = source.strip().partition("\n")[0]
        name = f"the cell {first_line!r}" if number is None else f"Cell In[{number}]"
        alone = ranks if len(ranks) < self._engines.size else None
        self.cells[cell_file(source)] = name, source
        announced = "expect_cell", (NotebookUpdate(sources={}, path=search_path()), number, alone)
        told, size = _Entry(name=name, ranks=frozenset(ranks), call=announced, cell=source), self._engines.size

        def note(done: list[int]) -> None:
            if done:
                self._keep(replace(told, ranks=frozenset(done), everyone=len(done) == size))

        return self._follow({rank: told.begin(self._engines, rank) for rank in ranks}, note)

    def push(self, values: dict[str, Any], news: NotebookUpdate) -> None:
        """Put values into the namespace of the cells of all ranks; tensors travel through one shared copy."""
        engines = self._engines
        ranks, names = frozenset(range(engines.size)), frozenset(values)
        payload, segment = pack(values, name="value", inline=engines.remote, segment_cache=SegmentCache(engines.anchor))
        try:
            engines.call(ranks, "push", (payload, news))
        except BaseException:
            segment.close()
            raise
        name = f"the push of {', '.join(values)}"
        self._keep(
            _Entry(
                name=name,
                ranks=ranks,
                call=("push", (payload, news)),
                everyone=True,
                names=names,
                segment=segment,
            )
        )
        while self._is_much() and (old := self._superseded()) is not None:
            self._told.remove(old)
            old.segment.close()

    def pull(self, name: str, rank: int) -> Any:
        """The value of a name in the namespace of one rank's cells.

        Raises:
            ClusterError: The name is not defined there.
        """
        engines = self._engines
        try:
            return unpack(engines.call([rank], "pull", (name, engines.remote))[rank])
        except EngineError as error:
            if "NameError" in str(error):
                raise ClusterError(f"{name!r} is not defined on rank {rank}.") from None
            raise

    def tie(self, marks: dict[str, str], ranks: list[int]) -> None:
        """Give classes of the cells the marks that they have in the notebook."""
        self._engines.call(ranks, "tie", (marks,))
        everyone = len(ranks) == self._engines.size
        self._keep(_Entry(name="the classes", ranks=frozenset(ranks), call=("tie", (marks,)), everyone=everyone))

    def take_over(self, engines: Engines) -> None:
        """Know what another kernel has told these engines."""
        anchor = engines.anchor
        assert anchor is not None
        told, self._knowing, self.cells = anchor.look()["notes"].get("told", ([], _processes(engines), {}))
        self._engines = engines
        self._told = [replace(each, segment=each.segment and Segment(1, anchor, each.segment)) for each in told]

    def _keep(self, told: _Entry) -> None:
        self._told.append(told)
        self._note()

    def _note(self) -> None:
        """Tell the anchor what another kernel would have to know."""
        if self._engines.anchor is not None:
            plain = [replace(told, segment=told.segment and told.segment.path) for told in self._told]
            self._engines.anchor.note("told", (plain, self._knowing, self.cells))

    def catch_up(self) -> bool:
        """Let engines that took ranks since the last time do what those had done; returns whether there was anything.

        They leave the world for it: a collective, which the others would not take part in, is an error and no hang.
        So a world has to be formed afterwards. What fails is named in a warning, and the rest goes on.

        Raises:
            ClusterError: The engines cannot be reached any more.
            EngineError: An engine was lost meanwhile.
            KeyboardInterrupt: It was interrupted. What was missing is done the next time, from the beginning.
        """
        engines, now = self._engines, _processes(self._engines)
        new = {rank for rank, process in now.items() if self._knowing.get(rank) != process}
        self._told = [replace(told, ranks=frozenset(now)) if told.everyone else told for told in self._told]
        owed = [told for told in self._told if told.ranks & new]
        if owed:
            engines.call(sorted(new), "leave")
            engines.formed = False
        for told in owed:
            calls = {rank: told.begin(engines, rank) for rank in sorted(told.ranks & new)}
            try:
                self._follow(calls).wait()
            except EngineError as error:
                if engines.lost:
                    raise
                what = str(error).partition("\n")[0].rstrip(".")
                if "process group has not been init" in what:
                    what = "it calls a collective, for which the other ranks have to come"
                warnings.warn(
                    f"{told.name} was run again on an engine that took the place of a lost one, and failed: {what}. "
                    "What it defines is missing there: run it again.", stacklevel=4,
                )  # fmt: skip
        if now != self._knowing:
            self._knowing = now
            self._note()
        return bool(owed)

    def clear(self) -> None:
        """Forget everything, and let go of the memory."""
        for told in self._told:
            if told.segment is not None:
                told.segment.close()
        self._told.clear()

    def _follow(self, calls: dict[int, Any], done: Callable[[list[int]], None] = lambda ranks: None) -> CellRun:
        engines = self._engines

        def where() -> Where:
            return Where.of(engines, None, self.cells)

        return CellRun(calls, engines.interrupt, engines.suspect, engines.check_alive, done, where)

    def _is_much(self) -> bool:
        sizes = [told.segment.size for told in self._told if told.segment is not None]
        return len(sizes) > _PUSHES or sum(sizes) > _PUSHED_BYTES

    def _superseded(self) -> _Entry | None:
        """The oldest push all of whose names were pushed again later."""
        for number, told in enumerate(self._told):
            later = frozenset[str]().union(*(after.names for after in self._told[number + 1 :]))
            if told.names and told.names <= later:
                return told
        return None


def _processes(engines: Engines) -> dict[int, tuple[str, int, float]]:
    """By which process each rank is taken."""
    return {engine.rank: (engine.host_id, engine.pid, engine.born_s) for engine in engines.records()}
