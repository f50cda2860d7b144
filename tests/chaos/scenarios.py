"""Chaos scenarios: kills, hangs and stops of a run, each as trials on a cluster that must not change its numbers."""

from __future__ import annotations

import functools
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab import Lab, Trial
from shared_cluster import until
from traps import PHASES, Traps
from workloads import STEPS, WORKLOADS

Scenario = Callable[[Lab, random.Random], Iterator[Trial]]


def every_rank_at_every_step(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """In the four phases of a step in turn; for every workload, the last two at only some steps."""
    for workload, stride in zip(WORKLOADS, (1, 1, 4, 4), strict=True):
        for step, rank in itertools.product(range(0, STEPS, stride), range(lab.ranks)):
            yield lab.survives(workload, (PHASES[(step + rank) % len(PHASES)], rank, step))


def in_a_collective(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """Up to 2 ms after the start of a backward, while gradients are reduced."""
    for i in range(24):
        workload = WORKLOADS[i % 2]
        yield lab.survives(workload, ("backward", i % lab.ranks, rng.randrange(STEPS), f"kill {rng.uniform(0, 2e-3)}"))


def in_the_update(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """When the optimizer of one rank is about to change its weights, or has just done it."""
    for workload, phase, rank in itertools.product(WORKLOADS[:3], ("update", "updated"), range(lab.ranks)):
        yield lab.survives(workload, (phase, rank, rng.randrange(STEPS)))


def between_two_updates(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """When a step has updated by one optimizer, and in the other phases of such a step."""
    for phase, rank in itertools.product((*PHASES, "update"), range(lab.ranks)):
        yield lab.survives("two optimizers", (phase, rank, rng.randrange(STEPS)))


def while_values_are_carried(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """In each phase of a step that keeps values of its own from batch to batch."""
    for phase, rank in itertools.product((*PHASES, "update"), range(lab.ranks)):
        yield lab.survives("carried values", (phase, rank, rng.randrange(STEPS)))


def by_a_segfault(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """In place of a kill."""
    for rank in range(lab.ranks):
        yield lab.survives(WORKLOADS[rank % 2], ("forward", rank, rng.randrange(STEPS), "segfault"))


def reading_data(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """While a worker of a rank reads a sample, or a rank reads its stream."""
    for workload in WORKLOADS[2:] * 4:
        yield lab.survives(workload, ("data", "any", rng.randrange(600)))


def in_evaluation(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """Of either epoch; a recovery after the last step cannot be timed by a step."""
    for workload, step, rank in itertools.product(WORKLOADS, (STEPS // 2, STEPS), range(lab.ranks)):
        if step == STEPS // 2 or workload in WORKLOADS[:2]:
            yield lab.survives(workload, ("evaluation", rank, step))


def writing_a_checkpoint(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """Every few steps of a model whose checkpoints have 30 MiB."""
    for i in range(6):
        kill = functools.partial(kill_at_a_checkpoint, lab, i % lab.ranks)
        yield lab.survives("30 MiB", meanwhile=kill, disk=True, checkpoint_every=rng.choice([3, 4, 5]))


def kill_at_a_checkpoint(lab: Lab, rank: int, run: Any, traps: Traps) -> None:
    """Kill a rank while the folder of a checkpoint exists, and its checkpoint.json does not."""
    folder = Path(run.plan.checkpoint)
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline and not run.ended:  # the moment is too short for a sleep
        if any(not (path / "checkpoint.json").exists() for path in folder.glob("*-step*")):
            traps.kill(lab.pids()[rank])
            return


def two_at_once(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """Two ranks in the same step; one spare is there, the other engine has to be started."""
    for pair in [*itertools.combinations(range(lab.ranks), 2)] * 2:
        step = rng.randrange(STEPS)
        yield lab.survives(WORKLOADS[step % 2], *((rng.choice(PHASES), rank, step) for rank in pair))


def all_at_once(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """All ranks are killed from outside at a random moment."""

    def blow(run, traps):
        run.wait(rng.uniform(0.0, 0.2))
        traps.kill(*lab.pids())

    for i in range(6):
        yield lab.survives(WORKLOADS[i % len(WORKLOADS)], meanwhile=blow)


def with_the_spare(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """A rank and the spare that would replace it."""

    def blow(run, traps):
        run.wait(rng.uniform(0.0, 0.1))
        spare = lab.cluster.spare_engines[0].pid
        traps.kill(lab.pids()[rng.randrange(lab.ranks)], spare)

    for i in range(4):
        yield lab.survives(WORKLOADS[i % 2], meanwhile=blow)


def during_recovery(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """A second rank, or the same one again: as it unpacks the task again, or up to 60 ms after the first."""
    for first, second in itertools.product(range(lab.ranks), range(lab.ranks)):
        step = rng.randrange(1, STEPS)
        yield lab.survives(WORKLOADS[(first + second) % 2], ("forward", first, step), ("unpack", second, 1))
    for i in range(6):

        def again(run, traps, rank=i % lab.ranks):
            until(lambda: run.ended or not traps.left)
            run.wait(rng.uniform(0.0, 0.06))
            if not run.ended:
                traps.kill(lab.pids()[rank])

        yield lab.survives(WORKLOADS[i % 2], ("forward", (i + 1) % lab.ranks, rng.randrange(1, 9)), meanwhile=again)


def again_and_again(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """In a longer run: random ranks, from outside, at random moments, half a dozen times."""

    def blows(run, traps):
        reached = -1
        for blow in range(6):
            if blow % 2 == 0:  # a run that gets no further gives up, however slow the machine is
                until(lambda reached=reached: run.ended or run.control.snapshot_store.last_step > reached)
            run.wait(rng.uniform(0.2, 0.6))
            if not run.ended:
                pids = lab.pids()
                traps.kill(*rng.sample(pids, rng.choice([1, 1, 1, 2])))
            reached = run.control.snapshot_store.last_step

    for workload in WORKLOADS:
        yield lab.survives(workload, meanwhile=blows, epochs=60)


def exceptions(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """In every phase, also at the first step, before the first snapshot."""
    for i, (workload, phase) in enumerate(itertools.product(WORKLOADS, (*PHASES, "evaluation"))):
        step = STEPS // 2 if phase == "evaluation" else rng.randrange(STEPS)
        yield lab.fails(workload, phase, i % lab.ranks, step)
    for workload in WORKLOADS[:2]:
        yield lab.fails(workload, "forward", 0, 0, check="no")  # which would meet the error, that comes once
    for workload in WORKLOADS[2:]:
        yield lab.fails(workload, "data", "any", rng.randrange(200, 600))


def stops(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """`run.stop()` at a random moment, then `cluster.resume()`."""
    for i in range(12):
        yield lab.stops(WORKLOADS[i % len(WORKLOADS)], rng, epochs=rng.choice([2, 10]))


def stops_now(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """`run.stop(now=True)` at a random moment, then `cluster.resume()`."""
    for i in range(12):
        yield lab.stops(WORKLOADS[i % len(WORKLOADS)], rng, now=True, epochs=rng.choice([2, 10]))


def stops_a_hang(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """`run.stop(now=True)` when a rank hangs in Python."""
    for i, phase in enumerate(("forward", "backward", "update", "evaluation")):
        step = STEPS // 2 if phase == "evaluation" else rng.randrange(1, STEPS)
        yield lab.stops(WORKLOADS[i % 2], rng, (phase, i % lab.ranks, step, "hang"), now=True)


def stops_a_hang_in_c(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """The same in C code that no signal reaches: the rank is replaced."""
    for i in range(4):
        yield lab.stops(
            WORKLOADS[i % 2], rng, ("forward", i % lab.ranks, rng.randrange(1, STEPS), "hang_in_c"), now=True
        )


def stopped_processes(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """SIGSTOP in any phase: the rank is replaced when no step has come for a second."""
    for i, phase in enumerate(PHASES):
        trap = phase, i % lab.ranks, rng.randrange(1, STEPS - 1), "sigstop"
        yield lab.survives(WORKLOADS[i % 2], trap, hang_timeout=1.0)


def fork_server_first(lab: Lab, rng: random.Random) -> Iterator[Trial]:
    """The fork server, which forks new engines, and then a rank: a new server starts them."""
    from nbdist.cluster import current_server

    def blow(run, traps):
        server = current_server()
        if server is not None:
            os.kill(server.pid, signal.SIGKILL)
            until(lambda: not server.alive)
        traps.kill(lab.pids()[1])

    for workload in WORKLOADS[:2]:
        yield lab.survives(workload, meanwhile=blow)


LOST: dict[str, Scenario] = {
    "`kill -9` of every rank at every step": every_rank_at_every_step,
    "`kill -9` in a collective": in_a_collective,
    "`kill -9` in the optimizer's step": in_the_update,
    "`kill -9` between a step's two updates": between_two_updates,
    "`kill -9` where a step carries values": while_values_are_carried,
    "`kill -9` while data is read": reading_data,
    "`kill -9` in evaluation": in_evaluation,
    "`kill -9` while a checkpoint is written": writing_a_checkpoint,
    "segfault": by_a_segfault,
    "two ranks at once": two_at_once,
    "all ranks at once": all_at_once,
    "a rank and the spare": with_the_spare,
    "a rank during recovery": during_recovery,
    "half a dozen kills in one run": again_and_again,
    "the fork server, then a rank": fork_server_first,
    "SIGSTOP, `hang_timeout=1`": stopped_processes,
}
COMMANDED: dict[str, Scenario] = {
    "exception in every phase": exceptions,
    "`run.stop()`, then resume": stops,
    "`run.stop(now=True)`, then resume": stops_now,
    "the same, a rank hangs": stops_a_hang,
    "the same, it hangs in C": stops_a_hang_in_c,
}
