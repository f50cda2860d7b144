"""Past runs, read back from their records on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nbdist.errors import PlanError, suggest
from nbdist.telemetry import events
from nbdist.telemetry.events import Event, Noted, Point, RunStarted, Shares, Work
from nbdist.telemetry.host import host_name
from nbdist.telemetry.rank_state import Happening, RankState, fold
from nbdist.telemetry.record import is_locked, records
from nbdist.telemetry.report import Report
from nbdist.telemetry.run_state import RunState

__all__ = ["PastRun", "past_run", "past_runs"]

_TAIL_BYTES = 1 << 16
_KINDS = {
    name: kind for name, kind in vars(events).items() if isinstance(kind, type) and issubclass(kind, events.Event)
}


def past_runs(count: int | None = None) -> list[PastRun]:
    """The runs of this user that have a record, the newest first; from any notebook, script or kernel. Local.

    Args:
        count: How many at most; all by default.
    """
    folder = records()
    names = sorted((path.name for path in folder.iterdir()), reverse=True) if folder.is_dir() else []
    found: list[PastRun] = []
    for name in names:
        if count is not None and len(found) >= count:
            break
        if next(_lines(folder / name / "rank0.jsonl"), None) is not None:  # empty if the run never began
            found.append(PastRun(folder / name))
    return found


def past_run(run_id: str) -> PastRun:
    """The run of that name; the beginning of its name is enough. Local.

    Raises:
        PlanError: There is none, or several.
    """
    names = [run.run_id for run in past_runs()]
    found = [name for name in names if name.startswith(run_id)]
    if len(found) == 1 or run_id in found:
        return PastRun(records() / (run_id if run_id in found else found[0]))
    if found:
        raise PlanError(
            f"{len(found)} runs begin with {run_id!r}, as {' and '.join(found[:2])}: give more of the name."
        )
    raise PlanError(
        f"there is no record of a run {run_id!r}: %dist_runs lists the recorded runs.{suggest(run_id, names)}"
    )


class PastRun(Report):
    """A run, read from its record.

    Args:
        path: The folder of the record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_id = path.name

    @property
    def state(self) -> str:
        """One of "running", "paused", "finished", "stopped" and "failed"; "lost" if all processes died before its end.

        Only the host of rank 0 can see that; elsewhere such a run keeps its last state.
        """
        return self.overview.state

    @functools.cached_property
    def overview(self) -> RunState:
        """The state from the first and the last lines of rank 0: fast, and enough for a list."""
        path = self.path / "rank0.jsonl"
        return self._folded({0: [_head(path), *_tail(path)]}, [])

    @functools.cached_property
    def progress(self) -> RunState:
        """The state from the whole record."""
        paths = {int(path.stem.removeprefix("rank")): path for path in self.path.glob("rank*.jsonl")}
        ranks = {rank: _events(_lines(path)) for rank, path in paths.items()}
        return self._folded(ranks, _events(_lines(self.path / "cluster.jsonl")))

    def _folded(self, ranks: Mapping[int, Iterable[Event]], cluster: Iterable[Event]) -> RunState:
        run: RunState | None = None
        last_s = 0.0
        for rank in sorted(ranks):
            state = RankState(rank=rank)
            for event in ranks[rank]:
                last_s = max(last_s, event.time_s)
                if isinstance(event, RunStarted):
                    if run is None:
                        run = RunState(title=event.title, plan=event.plan, ranks={0: state}, started_s=event.time_s)
                    elif state.pid:  # the rank began again after a loss
                        run.merge(state)
                        if rank == 0:
                            run.restart_ranks()
                            run.plan = event.plan  # it may have another number of ranks now
                    state = RankState(rank=rank)
                state = fold(state, event)
            if run is not None:
                run.merge(state)
        if run is None:
            raise PlanError(f"run {self.run_id} has no record of its beginning.")
        size = math.prod(run.plan["mesh"].values())
        run.ranks = {rank: state for rank, state in run.ranks.items() if rank < size}  # scaling removed the others
        recoveries = [Happening(event.time_s, "recovered", event.text) for event in cluster if isinstance(event, Noted)]
        run.happenings = sorted([*run.happenings, *recoveries])
        self._end(run, last_s)
        return run

    def _end(self, run: RunState, last_s: float) -> None:
        failed = [rank for rank in run.ranks.values() if rank.state == "failed"]
        if run.ranks[0].state in ("finished", "stopped"):
            run.end(run.ranks[0].state)
        elif failed:
            first = next((rank for rank in failed if "PeerLostError" not in rank.error), failed[0])
            run.end("failed", f"rank {first.rank}: {first.error}")
        elif run.ranks[0].host in ("", host_name()) and not is_locked(self.path / "rank0.jsonl"):
            run.end("lost", "its processes died without recording an end.")
        if run.ended_s is not None:
            run.ended_s = last_s


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a record, without the torn last line of a killed rank."""
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from _parsed(file)


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _head(path: Path) -> Event:
    return next(_events(_lines(path)))


def _tail(path: Path) -> Iterator[Event]:
    """The last events, without the head."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[1:]
    return (event for event in _events(_parsed(lines)) if not isinstance(event, RunStarted))


def _events(lines: Iterable[dict[str, Any]]) -> Iterator[Event]:
    """Events of a record; ignores kinds and fields of later versions."""
    for line in lines:
        kind = _KINDS.get(line.get("event", ""))
        if kind is None:
            continue
        if "losses" in line:  # of 0.1
            line = {**line, "curves": {"loss": line["losses"]}}
        names = {field.name for field in dataclasses.fields(kind)}
        yield kind(**{name: _of_json(name, value) for name, value in line.items() if name in names})


def _of_json(name: str, value: Any) -> Any:
    match name, value:
        case "curves", dict():
            return {key: tuple(Point(*point) for point in curve) for key, curve in value.items()}
        case "shares", list():
            return Shares(*value)
        case "work", list():
            return tuple(Work(*work) for work in value)
    return value
