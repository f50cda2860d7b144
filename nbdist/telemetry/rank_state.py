"""State of one rank: its step, loss, speed and history, folded from its events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from nbdist.telemetry.command_table import COMMANDS
from nbdist.telemetry.curves import Curve, all_extended
from nbdist.telemetry.events import (
    Checkpointed,
    CommandApplied,
    EpochFinished,
    Evaluating,
    Event,
    Noted,
    Point,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Shares,
    Work,
    Worked,
)

__all__ = ["Happening", "RankState", "fold"]

_KEPT_HAPPENINGS = 50
_LARGE = ("curves", "history", "stages", "place", "work", "happenings", "checked")
_BUSY_SMOOTHING = 0.3


class Happening(NamedTuple):
    """A line for the user about something that happened in a run.

    Args:
        time_s: When, in seconds since 1970.
        kind: "checkpoint", "command", "lost", "recovered" or "note".
        text: What, in a sentence.
        number: Distinguishes two with equal texts.
    """

    time_s: float
    kind: str
    text: str
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class RankState:
    """The latest known state of one rank, small enough to publish several times a second.

    Fields are those of the events they come from; `work` is the newest `Worked`. `state` is one of "starting",
    "running", "paused", "evaluating", "finished", "stopped", "failed", "lost", "recovering". `first_step` is the step
    after which the rank began, `busy_s` the smoothed seconds of a step in which it did not wait for others. `curves`
    are the loss over all ranks and what steps log, on rank 0.
    """

    rank: int
    state: str = "starting"
    host: str = ""
    pid: int = 0
    device: str = ""
    first_step: int = 0
    step: int = 0
    steps_total: int | None = None
    epoch: int = 0
    samples: int = 0
    loss: float | None = None
    samples_per_s: float = 0.0
    memory_mib: float = 0.0
    lr: float | None = None
    shares: Shares | None = None
    busy_s: float = 0.0
    curves: dict[str, Curve] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    place: dict[str, int] | None = None
    checked: str = ""
    work: Worked | None = None
    error: str = ""
    happenings: tuple[Happening, ...] = ()

    def to_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """The state as JSON-able data; nested values are shared, not copied.

        Args:
            whole: Whether to include large fields that change seldom.
        """
        data = dict(vars(self)) if whole else {name: value for name, value in vars(self).items() if name not in _LARGE}
        if data.get("work") is not None:
            data["work"] = data["work"].to_dict()
        return data

    @staticmethod
    def is_whole(data: dict[str, Any]) -> bool:
        """Whether a `to_dict` has the large fields."""
        return _LARGE[0] in data

    @classmethod
    def from_dict(cls, data: dict[str, Any], before: RankState | None = None) -> RankState:
        """The inverse of `to_dict`; missing fields are those of `before`, if it is of the same process and start."""
        given = {name: made(data[name]) for name, made in _OF_JSON.items() if data.get(name) is not None}
        if before is not None and (before.pid, before.first_step) == (data["pid"], data["first_step"]):
            return _with(before, **{**data, **given})
        return cls(**{**data, **given})


def _worked(data: dict[str, Any]) -> Worked:
    values = {key: item for key, item in data.items() if key != "event"}
    return Worked(**{**values, "work": tuple(Work(*item) for item in data["work"])})


_OF_JSON: dict[str, Callable[[Any], Any]] = {
    "work": _worked,
    "shares": lambda value: Shares(*value),
    "curves": lambda value: {name: tuple(Point(*point) for point in curve) for name, curve in value.items()},
    "happenings": lambda value: tuple(Happening(*happening) for happening in value),
    "history": tuple,
    "stages": tuple,
}


def _with(state: RankState, /, **changes: Any) -> RankState:
    """`dataclasses.replace` in a tenth of its time: it skips __init__."""
    made = object.__new__(RankState)
    vars(made).update(vars(state), **changes)
    return made


def fold(state: RankState, event: Event) -> RankState:
    """Return `state` after `event`."""
    match event:
        case RunStarted():
            return _with(
                state, state="running", host=event.host, pid=event.pid, device=event.device,
                steps_total=event.steps_total, stages=tuple(event.stages), place=event.place,
                lr=event.lr, first_step=event.step, step=event.step, history=tuple(event.history),
                checked=event.checked or state.checked,
            )  # fmt: skip
        case Progress():
            return _with(
                state, state="paused" if state.state == "paused" else "running",
                step=event.step, epoch=event.epoch, samples=event.samples,
                loss=state.loss if event.loss is None else event.loss,
                samples_per_s=event.samples_per_s, memory_mib=event.memory_mib, lr=event.lr,
                shares=event.shares or state.shares, busy_s=_smoothed(state, event),
                curves=all_extended(state.curves, event.curves),
            )  # fmt: skip
        case CommandApplied(command="pause"):
            return _with(_after(state, event, "command", _command_text(event)), state="paused", samples_per_s=0.0)
        case CommandApplied(command="resume"):
            return _with(_after(state, event, "command", _command_text(event)), state="running")
        case CommandApplied(command="lr", value=float(rate)):
            return _with(_after(state, event, "command", _command_text(event)), lr=rate)
        case CommandApplied():
            return _after(state, event, "command", _command_text(event, state.steps_total))
        case Checkpointed():
            return _after(state, event, "checkpoint", f"checkpoint of step {event.step:,} in {_short(event.path)}")
        case Noted():
            return _after(state, event, "note", event.text)
        case Worked():
            return _with(state, work=event)
        case Evaluating():
            return _with(state, state="evaluating")
        case EpochFinished():
            return _with(state, state="running", history=(*state.history, event.row))
        case RunFinished():
            return _with(state, state=event.state)
        case RunFailed():
            return _with(state, state="failed", error=event.error)
        case _:
            return state


def _short(path: str) -> str:
    """The end of a long path; the record has the whole path."""
    parts = PurePath(path).parts
    return path if len(parts) < 4 else "/".join(["…", *parts[-3 if len(parts) > 4 else -2 :]])


def _smoothed(state: RankState, event: Progress) -> float:
    if event.shares is None:
        return state.busy_s
    busy_s = event.step_s * (1 - event.shares.idle)
    return busy_s if not state.busy_s else state.busy_s + _BUSY_SMOOTHING * (busy_s - state.busy_s)


def _command_text(event: CommandApplied, steps_total: int | None = None) -> str:
    if event.command == "stop" and event.step == steps_total:
        return f"stop came in step {event.step:,}, the last one: it changes nothing"
    return f"{COMMANDS[event.command].applied_text(event.value)} after step {event.step:,}"


def _after(state: RankState, event: Event, kind: str, text: str) -> RankState:
    step, number = (event.step, event.number) if isinstance(event, CommandApplied) else (state.step, 0)
    happenings = (*state.happenings, Happening(event.time_s, kind, text, number))
    return _with(state, happenings=happenings[-_KEPT_HAPPENINGS:], step=step)
