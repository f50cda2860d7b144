"""Events and states of two ranks of a small run."""

from __future__ import annotations

from nbdist.telemetry import Progress, RankState, RunStarted, RunState

ROW = {"epoch": 1, "steps": 10, "samples": 320, "loss": 0.5, "seconds": 2.0, "val_loss": 0.6}
STARTED = RunStarted(
    rank=1,
    run_id="r",
    title="Net",
    plan={"mesh": {"dp": 2}, "threads": 3},
    steps_total=20,
    host="h",
    pid=7,
    device="cpu",
    place={"dp": 1},
)
PROGRESS = Progress(rank=1, step=10, epoch=1, samples=160, loss=0.4, samples_per_s=80.0, memory_mib=300.0)

FAST = RankState(rank=0, state="running", step=12, steps_total=20, samples=100, loss=0.2, samples_per_s=30.0)
SLOW = RankState(rank=1, state="running", step=11, steps_total=20, samples=90, loss=0.4, samples_per_s=20.0)


def run_of(*ranks):
    run = RunState(title="Net", plan={"mesh": {"dp": 2}}, ranks={r: RankState(rank=r) for r in range(len(ranks))})
    for rank in ranks:
        run.merge(rank)
    return run
