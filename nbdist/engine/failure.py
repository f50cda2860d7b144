"""Failures of ranks: exceptions and tracebacks from engines, merged into one EngineError with its cause."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nbdist.engine.follow.cell_sources import label_of, labelled
from nbdist.engine.stack_frames import frame_text, is_ours, is_plumbing, place_of
from nbdist.errors import EngineError, NbdistError, PeerLostError, PlanError, TaskError, ranks_text
from nbdist.telemetry.host import NAME_VARIABLE

__all__ = ["LOST", "PROCESS_ENDED", "Failure", "as_error"]

LOST = "EngineLost"
PROCESS_ENDED = "its process ended"

_FROM_WORKER = re.compile(r"Caught \w+ in (DataLoader worker process \d+)\.\nOriginal Traceback")
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
_LOADING = "/torch/utils/data/"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's failure, as its engine sends it to the kernel.

    Args:
        rank: The rank.
        time_s: When, in seconds since 1970: the earliest failure is the cause, not the first to arrive.
        kind: The name of the exception's class.
        message: Its text.
        place: The innermost line of the user's code, such as ``Cell In[5], line 3``; empty if unknown.
        traceback: With source lines, without frames of nbdist.
        secondary: Whether it only reports that another rank is gone (a peer's connection error).
        host: Where there are several hosts, the user's name for the rank's; else empty.
    """

    rank: int
    time_s: float
    kind: str
    message: str
    place: str
    traceback: str
    secondary: bool
    host: str = ""

    @classmethod
    def lost(cls, rank: int) -> Failure:
        """The failure of a rank whose process ended. Secondary: any exception of another rank is the cause."""
        return replace(cls.reported(rank, LOST, PROCESS_ENDED), secondary=True)

    @classmethod
    def reported(cls, rank: int, kind: str, message: str) -> Failure:
        """A failure of which only the class name and the text are known."""
        return cls(rank=rank, time_s=time.time(), kind=kind, message=message, place="", traceback="", secondary=False)

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe an exception just caught. Runs on the engine, where the source lines are."""
        frames, message = _unwrapped(error)
        users = [frame for frame in frames if not (is_ours(frame) or is_plumbing(frame))]
        ours = isinstance(error, NbdistError)  # its text is for the user: frames of nbdist do not help
        shown = users if users or ours else frames
        places = [frame for frame in users if label_of(frame.filename)] or users
        innermost = places[-1] if places else None
        kind = type(error).__name__
        text = [frame_text(frame) for frame in shown]
        if shown:
            raised = traceback.format_exception_only(type(error), error)
            text.append("".join(raised).rstrip() if message == str(error) else f"{kind}: {message}")
        return cls(
            rank=rank,
            time_s=time.time(),
            kind=kind,
            message=labelled(message) if ours else message,
            place=place_of(innermost) if innermost else "",
            traceback="\n".join(text),
            secondary=isinstance(error, PeerLostError),
            host=os.environ.get(NAME_VARIABLE, ""),
        )


def as_error(failures: Iterable[Failure]) -> EngineError:
    """Merge the failures of several ranks into one error.

    The earliest failure that is not secondary is the cause, else the loss of a rank, which may become known later than
    its peers' connection errors; ranks with the same failure are named with it. A PlanError or TaskError raised on an
    engine is an instance of that class too, as if the kernel had raised it.
    """
    ordered = sorted(failures, key=lambda failure: (failure.secondary, failure.kind != LOST, failure.time_s))
    cause = ordered[0]
    same = [f for f in ordered if (f.kind, f.message, f.place) == (cause.kind, cause.message, cause.place)]
    where = f" ({cause.place})" if cause.place else ""
    hosts = ", ".join(sorted({f.host for f in same if f.host}))
    who = f"{ranks_text(f.rank for f in same)}{f' on {hosts}' if hosts else ''}"
    message = f"{who}: {cause.kind}: {cause.message}{where}"
    error_class = _ENGINE_ERRORS.get(cause.kind, EngineError)
    return error_class(message, cause.traceback, rank=cause.rank)


class _EnginePlanError(EngineError, PlanError):
    """A PlanError that was raised on an engine."""


class _EngineTaskError(EngineError, TaskError):
    """A TaskError that was raised on an engine."""


_ENGINE_ERRORS: dict[str, type[EngineError]] = {"PlanError": _EnginePlanError, "TaskError": _EngineTaskError}
for _class in _ENGINE_ERRORS.values():
    _class.__name__ = EngineError.__name__  # a notebook shows this name


def _unwrapped(error: BaseException) -> tuple[list[traceback.FrameSummary], str]:
    """The frames of an error, and its text. Torch puts a DataLoader worker's frames into the text: parsed here."""
    text = str(error)
    worker = _FROM_WORKER.match(text)
    if worker is None:
        return list(traceback.extract_tb(error.__traceback__)), text
    frames = [
        traceback.FrameSummary(file, int(line), name, lookup_line=False)
        for file, line, name in _FRAME.findall(text)
        if _LOADING not in file
    ]
    return frames, f"{text.rstrip().rpartition(f'{type(error).__name__}: ')[2]} (in {worker[1]})"
