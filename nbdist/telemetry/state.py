"""State: events folded, first into one rank's state, then over all ranks."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nbdist.telemetry.events import (
    EpochFinished,
    Evaluating,
    Event,
    Noted,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Work,
    Worked,
)

__all__ = ["RankState", "RunState", "fold"]

ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True, kw_only=True)
class RankState:
    """The latest that is known of one rank: a snapshot, small enough to publish several times a second.

    Fields are those of the events they come from; `work` is the newest of its kind. `state` is one of "starting",
    "running", "evaluating", "finished", "stopped", "failed", "lost".
    """

    rank: int
    state: str = "starting"
    host: str = ""
    pid: int = 0
    device: str = ""
    step: int = 0
    steps_total: int | None = None
    epoch: int = 0
    samples: int = 0
    loss: float | None = None
    samples_per_s: float = 0.0
    memory_mib: float = 0.0
    history: tuple[dict[str, Any], ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    work: Worked | None = None
    error: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RankState:
        """The inverse of `to_dict`."""
        work = data.get("work")
        if work is not None:
            work = Worked(**{**work, "work": tuple(Work(*item) for item in work["work"])})
        return cls(**{**data, "history": tuple(data["history"]), "stages": tuple(data["stages"]), "work": work,
            "notes": tuple(data["notes"])})  # fmt: skip


def fold(state: RankState, event: Event) -> RankState:
    """Return `state` after `event`."""
    match event:
        case RunStarted():
            return replace(
                state, state="running", host=event.host, pid=event.pid, device=event.device,
                steps_total=event.steps_total, stages=tuple(event.stages), step=event.step,
                history=tuple(event.history),
            )  # fmt: skip
        case Progress():
            return replace(
                state, state="running", step=event.step, epoch=event.epoch, samples=event.samples,
                loss=state.loss if event.loss is None else event.loss,
                samples_per_s=event.samples_per_s, memory_mib=event.memory_mib,
            )  # fmt: skip
        case Noted():
            return replace(state, notes=(*state.notes, event.text))
        case Worked():
            return replace(state, work=event)
        case Evaluating():
            return replace(state, state="evaluating")
        case EpochFinished():
            return replace(state, state="running", history=(*state.history, event.row))
        case RunFinished():
            return replace(state, state=event.state)
        case RunFailed():
            return replace(state, state="failed", error=event.error)
        case _:
            return state


@dataclass
class RunState:
    """The whole run as the notebook sees it.

    Args:
        title: What is trained: the model's class and size.
        plan: The plan as JSON-able data.
        ranks: The latest state of every rank.
        state: "starting", "running", "recovering", "stopping", "finished", "stopped" or "failed".
        error: One line about what went wrong, if anything did.
        notes: What else a person should know: ranks that were lost and replaced, a checkpoint that was not written.
    """

    title: str
    plan: dict[str, Any]
    ranks: dict[int, RankState]
    state: str = "starting"
    error: str = ""
    notes: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.time)
    ended_s: float | None = None

    def merge(self, rank: RankState) -> None:
        """Take in the newest snapshot of one rank."""
        self.ranks[rank.rank] = rank
        self.notes += [note for note in rank.notes if note not in self.notes]
        if self.state in ("starting", "recovering") and rank.state == "running":
            self.state = "running"

    def stand_at(self, step: int) -> None:
        """What came home is the state after `step` steps, whatever ranks had begun after that."""
        self.ranks = {rank: replace(state, step=step) for rank, state in self.ranks.items()}

    def end(self, state: str, error: str = "") -> None:
        """The run is over."""
        self.state, self.error, self.ended_s = state, error, time.time()

    @property
    def running(self) -> bool:
        """Whether the run has not ended yet."""
        return self.state not in ENDED

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, up to now or to the end."""
        return (self.ended_s or time.time()) - self.started_s

    @property
    def step(self) -> int:
        """Optimizer steps that every rank has done."""
        return min(rank.step for rank in self.ranks.values())

    @property
    def steps_total(self) -> int | None:
        """Optimizer steps planned; None where the data has no length."""
        return self.ranks[0].steps_total

    @property
    def samples(self) -> int:
        """Samples trained on, over all replicas."""
        return sum(rank.samples for rank in self.ranks.values()) // self._ranks_a_sample

    @property
    def _ranks_a_sample(self) -> int:
        """How many ranks work on the same sample."""
        mesh = self.plan["mesh"]
        return int(mesh.get("pp", 1) * mesh.get("tp", 1))

    @property
    def samples_per_s(self) -> float:
        """Speed over all ranks: at the moment while running, of the whole training afterwards."""
        if self.running:
            return sum(rank.samples_per_s for rank in self.ranks.values()) / self._ranks_a_sample
        seconds = sum(row["seconds"] for row in self.history)
        return sum(row["samples"] for row in self.history) / seconds if seconds else 0.0

    @property
    def loss(self) -> float | None:
        """Mean of the ranks' latest losses while running; the last epoch's exact mean afterwards."""
        if not self.running and self.history:
            return float(self.history[-1]["loss"])
        losses = [rank.loss for rank in self.ranks.values() if rank.loss is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """One row an epoch; every rank holds the same."""
        return self.ranks[0].history

    @property
    def stages(self) -> tuple[dict[str, Any], ...]:
        """What a pipeline was cut into; every rank knows the same. See `RunStarted`."""
        return self.ranks[0].stages
