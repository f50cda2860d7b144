"""What went wrong on the engines: many failures, one cause."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nbdist.cluster.definitions import label_of, labelled
from nbdist.cluster.frames import frame_text, is_ours, is_plumbing, place_of
from nbdist.errors import EngineError, NbdistError, PeerLostError, PlanError, TaskError, ranks_text

__all__ = ["LOST", "PROCESS_ENDED", "Failure", "as_error"]

LOST = "EngineLost"
PROCESS_ENDED = "its process ended"

_FROM_WORKER = re.compile(r"Caught \w+ in (DataLoader worker process \d+)\.\nOriginal Traceback")
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
_LOADING = "/torch/utils/data/"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's failure, as it travels home.

    Args:
        rank: Where.
        time_s: When, in seconds since 1970, for order of arrival is not cause.
        kind: The exception's class.
        message: Its text.
        place: The innermost line of the user's code, such as ``Cell In[5], line 3``; empty if unknown.
        traceback: With source lines, ours left out.
        echo: Whether it only says that another rank was gone.
    """

    rank: int
    time_s: float
    kind: str
    message: str
    place: str
    traceback: str
    echo: bool

    @classmethod
    def lost(cls, rank: int) -> Failure:
        """Of a rank that is not there any more; nothing but an echo of that."""
        return replace(cls.told(rank, LOST, PROCESS_ENDED), echo=True)

    @classmethod
    def told(cls, rank: int, kind: str, message: str) -> Failure:
        """Of which no more is known than a word and a text."""
        return cls(rank=rank, time_s=time.time(), kind=kind, message=message, place="", traceback="", echo=False)

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe an exception just caught. Runs on the engine, where the source lines are."""
        frames, message = _unwrapped(error)
        users = [frame for frame in frames if not (is_ours(frame) or is_plumbing(frame))]
        ours = isinstance(error, NbdistError)  # a sentence for the user: where we raised it is of no interest
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
            echo=isinstance(error, PeerLostError),
        )


def as_error(failures: Iterable[Failure]) -> EngineError:
    """The one error that a person gets for the failures of several ranks.

    The earliest real failure is the cause, else the loss of a rank, which may be known later than what its peers say of
    it; ranks that failed in the same way are named with it, echoes are left out.
    What an engine refused is a PlanError or a TaskError too, as if it had been found before.
    """
    ordered = sorted(failures, key=lambda failure: (failure.echo, failure.kind != LOST, failure.time_s))
    cause = ordered[0]
    same = [f for f in ordered if (f.kind, f.message, f.place) == (cause.kind, cause.message, cause.place)]
    where = f" ({cause.place})" if cause.place else ""
    message = f"{ranks_text(f.rank for f in same)}: {cause.kind}: {cause.message}{where}"
    refused = _REFUSED.get(cause.kind, EngineError)
    return refused(message, cause.traceback, rank=cause.rank)


class _PlanRefused(EngineError, PlanError):
    """An engine found that an option cannot be run."""


class _TaskRefused(EngineError, TaskError):
    """An engine found that something supplied cannot be used."""


_REFUSED: dict[str, type[EngineError]] = {"PlanError": _PlanRefused, "TaskError": _TaskRefused}
for _kind in _REFUSED.values():
    _kind.__name__ = EngineError.__name__  # what a notebook shows


def _unwrapped(error: BaseException) -> tuple[list[traceback.FrameSummary], str]:
    """The frames of an error and its text. Those of a data-loading worker torch has put into the text."""
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
