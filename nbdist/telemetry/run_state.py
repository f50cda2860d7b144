"""State of a run: the latest states of all ranks, merged; its step, loss, throughput and ETA."""

from __future__ import annotations

import bisect
import collections
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nbdist.telemetry.curves import Curve, all_extended
from nbdist.telemetry.rank_state import Happening, RankState

__all__ = ["RunState"]

ENDED = ("finished", "stopped", "failed", "lost")
_SLOW = 1.3
"""A rank is slow if its step takes this many times the median of the others."""
_SLOW_S = 1e-3
"""And at least this much longer, in seconds a step: less is within the clock's noise."""
_WAITING = 0.5
"""A rank is waiting if it waits for others for more than this share of its time."""
_ETA_OVER_S = 60.0
_MARK_EVERY_S = 1.0


@dataclass
class RunState:
    """The whole run as the notebook sees it.

    Args:
        title: What is trained: the model's class and size.
        plan: The plan as JSON-able data.
        ranks: The latest state of every rank.
        state: "queued", "starting", "running", "paused", "recovering", "stopping", "finished", "stopped" or "failed";
            "lost" for a record without an end.
        error: One line about what went wrong, if anything did.
        happenings: Lines for the user, in order of time: checkpoints, commands, ranks that were lost and replaced.
    """

    title: str
    plan: dict[str, Any]
    ranks: dict[int, RankState]
    state: str = "starting"
    error: str = ""
    happenings: list[Happening] = field(default_factory=list)
    started_s: float = field(default_factory=time.time)
    ended_s: float | None = None

    def __post_init__(self) -> None:
        self._known: set[tuple[str, str, int]] = set()
        self._curves: dict[str, Curve] = {}  # before the ranks last began
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._steps, self._stepped_s = 0, time.monotonic()  # of all ranks together, and when the last one was

    def merge(self, *states: RankState) -> None:
        """Merge newer states of ranks, in this order."""
        for state in states:
            self._merge(state)
        self._mark()

    def _merge(self, rank: RankState) -> None:
        self.ranks[rank.rank] = rank
        for happening in rank.happenings:
            if rank.rank == 0 or happening.kind == "note":
                self._add(happening)
        if self.state in ("starting", "recovering", "running") and rank.rank == 0 and rank.state == "paused":
            self.state = "paused"
        elif rank.state == "running" and (
            self.state in ("starting", "recovering") or (self.state == "paused" and rank.rank == 0)
        ):
            self.state = "running"

    def note(self, text: str, kind: str = "note") -> None:
        """Add a line for the user; see `Happening`."""
        self._add(Happening(time.time(), kind, text))

    def begin(self) -> None:
        """The run begins now; it may have been queued."""
        self.state = "stopping" if self.state == "stopping" else "starting"
        self.started_s = time.time()

    def recover(self) -> None:
        """Ranks were lost, or their number changes: they restart."""
        self.state = "stopping" if self.state == "stopping" else "recovering"
        self.restart_ranks()

    def wait_in_queue(self) -> None:
        """The run begins later."""
        self.state = "queued"

    def stop(self) -> None:
        """The run is to end after this step."""
        self.state = "stopping"

    def reopen(self) -> None:
        """The run goes on, though its record or another kernel says that it has ended."""
        self.state, self.error, self.ended_s = "running", "", None

    def restart_ranks(self) -> None:
        """Ranks are about to resume from an earlier step: keep the loss curve so far."""
        self._curves = self.curves
        self._marks.clear()

    def resize(self, count: int) -> None:
        """Set the number of ranks."""
        self.ranks = {rank: self.ranks.get(rank, RankState(rank=rank)) for rank in range(count)}

    def set_step(self, step: int) -> None:
        """Set the step of all ranks to that of the loaded weights, though ranks may have begun later steps."""
        self.ranks = {rank: replace(state, step=step) for rank, state in self.ranks.items()}

    def end(self, state: str, error: str = "") -> None:
        """The run is over."""
        self.state, self.error, self.ended_s = state, error, time.time()

    def _add(self, happening: Happening) -> None:
        key = happening.kind, happening.text, happening.number
        if key not in self._known:  # several ranks may report it, and a replaced rank again
            self._known.add(key)
            self.happenings.append(happening)

    def _mark(self) -> None:
        now_s, step = time.monotonic(), self.step
        if self.state != "running":
            self._marks.clear()  # the ETA uses the speed after the pause only
        steps = sum(rank.step for rank in self.ranks.values())  # of many, each is seen once in a while
        if steps != self._steps or self.state != "running":
            self._steps, self._stepped_s = steps, now_s
        if not self._marks or now_s >= self._marks[-1][0] + _MARK_EVERY_S:
            self._marks.append((now_s, step))
            while self._marks[0][0] < now_s - _ETA_OVER_S:
                self._marks.popleft()

    @property
    def checked(self) -> str:
        """What the check before the first update found, see `Plan`; empty before it ended."""
        return self.ranks[0].checked if 0 in self.ranks else ""

    @property
    def running(self) -> bool:
        """Whether the run has not ended yet."""
        return self.state not in ENDED

    @property
    def notes(self) -> list[str]:
        """The texts of happenings other than commands and checkpoints."""
        return [happening.text for happening in self.happenings if happening.kind not in ("command", "checkpoint")]

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, up to now or to the end."""
        return (self.ended_s or time.time()) - self.started_s

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end, at the speed of the last minute; None if unknown."""
        total = self.steps_total
        if self.state != "running" or total is None or len(self._marks) < 2:
            return None
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        if last <= first:
            return None
        return (total - last) * (last_s - first_s) / (last - first) - (time.monotonic() - last_s)

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step of a run that is running."""
        return time.monotonic() - self._stepped_s if self.state == "running" else 0.0

    @property
    def standings(self) -> dict[int, str]:
        """Each rank compared with the others: its `state`, or "waiting" or "slow" instead of "running"."""
        busy = sorted(rank.busy_s for rank in self.ranks.values() if rank.busy_s)
        return {number: self._standing(rank, busy) for number, rank in self.ranks.items()}

    def _standing(self, rank: RankState, busy: list[float]) -> str:
        """See `standings`; with the sorted busy times of all ranks."""
        if rank.state != "running":
            return rank.state
        if self.state == "recovering":
            return "waiting"
        if rank.busy_s and len(busy) > 1:
            usual = _median_without(busy, bisect.bisect_left(busy, rank.busy_s))
            if rank.busy_s > max(_SLOW * usual, usual + _SLOW_S):
                return "slow"
        return "waiting" if rank.shares is not None and rank.shares.idle > _WAITING else "running"

    @property
    def step(self) -> int:
        """Optimizer steps that every rank has done."""
        return min(rank.step for rank in self.ranks.values())

    @property
    def steps_total(self) -> int | None:
        """Optimizer steps planned; None where the data has no length."""
        return self.ranks[0].steps_total

    @property
    def epoch(self) -> int:
        """The epoch of the slowest rank, counted from 1."""
        return max(1, min(rank.epoch for rank in self.ranks.values()))

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
        """Throughput over all ranks: the current one while running, the mean of the training afterwards."""
        if self.running:
            return sum(rank.samples_per_s for rank in self.ranks.values()) / self._ranks_a_sample
        seconds = sum(row["seconds"] for row in self.history)
        return sum(row["samples"] for row in self.history) / seconds if seconds else 0.0

    @property
    def lr(self) -> float | None:
        """Learning rate of the optimizer's first group."""
        return self.ranks[0].lr

    @property
    def loss(self) -> float | None:
        """The newest steps' loss over all ranks while running; the last epoch's exact mean afterwards."""
        if not self.running and self.history:
            return float(self.history[-1]["loss"])
        losses = [rank.loss for rank in self.ranks.values() if rank.loss is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def curves(self) -> dict[str, Curve]:
        """The loss over all ranks, as "loss", and what steps log, by name; each in fewer than `POINTS` points."""
        first = self.ranks[0].first_step
        earlier = {name: tuple(point for point in curve if point.step <= first) for name, curve in self._curves.items()}
        return all_extended(earlier, self.ranks[0].curves) if earlier else self.ranks[0].curves

    @property
    def curve(self) -> Curve:
        """That of the loss."""
        return self.curves.get("loss", ())

    @property
    def history(self) -> tuple[dict[str, Any], ...]:
        """One row an epoch; every rank holds the same."""
        return self.ranks[0].history

    @property
    def stages(self) -> tuple[dict[str, Any], ...]:
        """The stages of a pipeline; every rank knows the same. See `RunStarted`."""
        return self.ranks[0].stages


def _median_without(ascending: Sequence[float], left_out: int) -> float:
    """The median of two numbers or more without the one with an index."""

    def other(index: int) -> float:
        return ascending[index + (index >= left_out)]

    middle, odd = divmod(len(ascending) - 1, 2)
    return other(middle) if odd else (other(middle - 1) + other(middle)) / 2
