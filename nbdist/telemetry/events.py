"""Events: frozen facts about one rank of one run. They know nothing of who draws or stores them."""

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
    """What all events share.

    Args:
        rank: The rank that it happened on.
        time_s: When, in seconds since 1970 (UTC).
    """

    rank: int
    time_s: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON-able data, its kind under ``event``; what lies in it is shared, not copied."""
        return {"event": type(self).__name__, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The rank is ready for its first step. `steps_total` is None where the data has no length.

    `stages` are those that a pipeline was cut into: of each its number, the names where it begins and ends, the
    measured seconds of one example's forward, and how many parameters it holds. `place` is where the rank stands on
    each axis of the mesh. `step`, `history` and the learning rate `lr` are where it goes on, after a rank was lost or
    from a checkpoint.
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


class Point(NamedTuple):
    """The loss over all ranks in some steps in a row.

    Args:
        step: The last of them, counted from 1.
        steps: How many.
        mean: The mean of their losses.
        low: The least of them.
        high: The greatest.
    """

    step: int
    steps: int
    mean: float
    low: float
    high: float


class Shares(NamedTuple):
    """What a rank has spent its time on, as parts of one.

    Args:
        compute: All that is not one of the others.
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
    """Where the rank stands, several times a second; counts are since the start of the run.

    Args:
        step: Optimizer steps done.
        epoch: The epoch being read, from 1.
        samples: Samples this rank has trained on.
        loss: Mean loss of this rank's part of the latest step, None where it had no part.
        samples_per_s: This rank's speed since the event before.
        memory_mib: Memory of the device in use by this rank: allocated on a GPU, resident on a CPU.
        lr: Learning rate of the optimizer's first group.
        step_s: Seconds that a step has taken since the event before, evaluations and pauses left out.
        shares: On what, on this rank.
        losses: What the steps since the event before have lost, over all ranks; told by rank 0 alone.
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
    losses: tuple[Point, ...] = ()


class Work(NamedTuple):
    """One piece of work in a pipeline.

    Args:
        kind: "forward" or "backward".
        stage: Of which stage of the pipeline.
        microbatch: Of which microbatch of the step.
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
    """What the rank of a pipeline did in one step, told for one step every few seconds, the same on all ranks."""

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
    """All ranks have carried out what a user asked for, after the same step.

    Args:
        command: "stop", "pause", "resume", "checkpoint", "lr" or "scale".
        value: The new learning rate of the first group, the folder of the checkpoint, or how many engines; else None.
        step: Optimizer steps that were done.
        number: Which order to the run it is, counted from 0: a run that recovers carries out some of them again.
    """

    command: str
    value: float | str | None
    step: int
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """A checkpoint lies on the disk, whole.

    Args:
        step: Optimizer steps that are done in it.
        path: Its folder.
        seconds: How long it took to write, beside the training.
    """

    step: int
    path: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Noted(Event):
    """Something that a user should know, in a sentence; the run goes on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Recovered(Event):
    """This rank was lost, and another process has taken its place.

    Args:
        step: Steps that were done in the snapshot from which all ranks go on.
        seconds: From the moment that the loss was noticed to the first step after it.
    """

    step: int
    seconds: float
