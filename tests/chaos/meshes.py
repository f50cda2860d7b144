"""Chaos scenarios for models in parts: on every mesh of four ranks, every rank, sampled steps."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

from lab import Lab, Trial
from scenarios import Scenario
from workloads import MESHES, STEPS

RANKS = 4
HANG_TIMEOUT_S = 1.0


def kills(mesh: str, lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """Of every rank: before and after its update, and in the step that follows."""
    for rank, phase in itertools.product(range(RANKS), ("update", "updated")):
        yield lab.survives(mesh, (phase, rank, rng.randrange(STEPS)))
    for rank in range(RANKS):
        yield lab.survives(mesh, ("updated", rank, rng.randrange(STEPS - 1), f"kill {rng.uniform(0, 1e-2)}"))


def kills_from_outside(mesh: str, lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """One rank or two, at random moments of a longer run."""

    def blows(run, traps):
        for _ in range(3):
            run.wait(rng.uniform(0.2, 0.6))
            if not run.ended:
                traps.kill(*rng.sample(lab.pids(), rng.choice([1, 1, 2])))

    yield lab.survives(mesh, meanwhile=blows, epochs=30)


def exceptions(mesh: str, lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """On every rank."""
    for rank in range(RANKS):
        yield lab.fails(mesh, rng.choice(["update", "updated"]), rank, rng.randrange(1, STEPS))


def stops(mesh: str, lab: Lab, rng: random.Random, *, now: bool) -> Iterator[Trial]:
    """`run.stop()` at a random moment, then `cluster.resume()`."""
    for epochs in (2, 10, 10):
        yield lab.stops(mesh, rng, now=now, epochs=epochs)


def stopped_processes(mesh: str, lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """SIGSTOP of two ranks in turn, which are replaced when no step has come for a second."""
    for rank in rng.sample(range(RANKS), 2):
        trap = "updated", rank, rng.randrange(1, STEPS - 1), "sigstop"
        yield lab.survives(mesh, trap, hang_timeout=HANG_TIMEOUT_S)


def events_of(mesh: str) -> dict[str, Scenario]:
    """All that may happen on a mesh, by name."""
    scenarios = {
        "`kill -9` of every rank": kills,
        "kills at any moment of a longer run": kills_from_outside,
        "exception on every rank": exceptions,
        "`run.stop()`, then resume": functools.partial(stops, now=False),
        "`run.stop(now=True)`, then resume": functools.partial(stops, now=True),
        "SIGSTOP, `hang_timeout=1`": stopped_processes,
    }
    return {name: functools.partial(scenario, mesh) for name, scenario in scenarios.items()}


__all__ = ["MESHES", "RANKS", "events_of"]
