"""Events: frozen facts about one rank of one run, such as progress and metrics; sinks store or draw them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

__all__ = [
    "Checkpointed",
    "CommandApplied",
    "EpochFinished",
    "Evaluating",
    "Event",
    "Noted",
    "Point",
    "Progress",
    "Recovered",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "Shares",
    "Work",
    "Worked",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """The fields of all events.

    Args:
        rank: The rank on which it happened.
        time_s: When, in seconds since 1970 (UTC).
    """

    rank: int
    time_s: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON-able data, its kind under ``event``; nested values are shared, not copied."""
        return {"event": type(self).__name__, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The rank is ready for its first step. `steps_total` is None where the data has no length.

    `stages` describes each stage of a pipeline: its number, its first and last module, the measured seconds of one
    example's forward, and its number of parameters. `place` is the rank's coordinate on each axis of the mesh. `step`,
    `history` and the learning rate `lr` are where the run continues from, after a rank was lost or from a checkpoint.
    `checked` is what the check before the first update found, see `Plan`.
    """

    run_id: str
    title: str
    plan: dict[str, Any]
    steps_total: int | None
    host: str
    pid: int
    device: str
    stages: list[dict[str, Any]] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)
    lr: float | None = None
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    checked: str = ""


class Point(NamedTuple):
    """A point of a curve: the mean loss over all ranks, or a number that the step logs, in consecutive steps.

    Args:
        step: The last of the steps, counted from 1.
        steps: How many steps.
        mean: The mean of their values.
        low: The least of their values.
        high: The greatest of their values.
    """

    step: int
    steps: int
    mean: float
    low: float
    high: float


class Shares(NamedTuple):
    """How a rank's time splits, as parts of one.

    Args:
        compute: All time that is none of the others.
        communication: Moving and adding tensors of other ranks.
        data: Waiting for the next batch.
        idle: Waiting for other ranks.
    """

    compute: float
    communication: float
    data: float
    idle: float


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """The rank's progress, several times a second; counts are since the start of the run.

    Args:
        step: Optimizer steps done.
        epoch: The epoch being read, from 1.
        samples: Samples this rank has trained on.
        loss: Mean loss of this rank's part of the latest step, None where it had no part.
        samples_per_s: This rank's speed since the previous event.
        memory_mib: Memory of the device in use by this rank: allocated on a GPU, resident on a CPU.
        lr: Learning rate of the optimizer's first group.
        step_s: Seconds a step since the previous event, without evaluations and pauses.
        shares: How that time splits, on this rank.
        curves: The loss over all ranks, as "loss", and what the step logs, in the steps since the previous event; rank
            0 alone reports them.
    """

    step: int
    epoch: int
    samples: int
    loss: float | None
    samples_per_s: float
    memory_mib: float
    lr: float | None = None
    step_s: float = 0.0
    shares: Shares | None = None
    curves: dict[str, tuple[Point, ...]] = field(default_factory=dict)


class Work(NamedTuple):
    """One forward or backward of a pipeline stage.

    Args:
        kind: "forward" or "backward".
        stage: The stage of the pipeline.
        microbatch: The microbatch of the step.
        start_s: When it began, in seconds since 1970: comparable over the ranks of a host.
        end_s: When it ended.
    """

    kind: str
    stage: int
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Worked(Event):
    """What a rank of a pipeline did in one step; reported for one step every few seconds, the same on all ranks."""

    step: int
    work: tuple[Work, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluating(Event):
    """The rank begins an evaluation on the validation data."""


@dataclass(frozen=True, kw_only=True)
class EpochFinished(Event):
    """An epoch is over; `row` is what `Run.history` holds, the same on every rank."""

    row: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run ended well. `state` is "finished" or "stopped"."""

    state: str


@dataclass(frozen=True, kw_only=True)
class RunFailed(Event):
    """The rank left the run with an error."""

    error: str


@dataclass(frozen=True, kw_only=True)
class CommandApplied(Event):
    """All ranks have applied a user's command, after the same step.

    Args:
        command: One of `COMMANDS`.
        value: The new learning rate of the first group, the folder of the checkpoint, or how many engines; else None.
        step: Optimizer steps that were done.
        number: The command's number in the run, from 0: a recovering run applies some commands again.
    """

    command: str
    value: float | str | None
    step: int
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """A complete checkpoint is on disk.

    Args:
        step: Optimizer steps done in it.
        path: Its folder.
        seconds: How long it took to write, in the background.
    """

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Noted(Event):
    """A note to the user, in a sentence; the run continues."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """This rank was lost, and another process replaces it.

    Args:
        step: Steps done in the snapshot from which all ranks resume.
        seconds: From noticing the loss to the first step after it.
    """

    step: int
    seconds: float
