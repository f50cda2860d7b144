"""A run of more engines than this machine could hold: ranks say what ranks say, the panel is the real one."""

from __future__ import annotations

import dataclasses
import math
import random
import time

from nbdist.cluster.runs.run import Run
from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RunSpec
from nbdist.notebook.dashboard import PanelDashboard
from nbdist.plan import Plan
from nbdist.telemetry import Happening, Point, RankState, RunState, Shares

LOST, SLOW = 17, 41
_UPDATE_S = 0.1
_FIRST, _LAST = 4000, 8000


def show(size: int, mesh: str, steps: int = 0) -> None:
    """Display the panel of a run on `size` GPUs, and let it go on for some steps, one an update.

    Of more ranks than `LOST` and `SLOW`, these two are.
    """
    plan = Plan.create(ranks=size, cores=size, epochs=10, batch_size=256, strategy=mesh)
    progress = _run(size, plan)
    panel = PanelDashboard()
    spec = RunSpec(run_id="20261126-101500-4f2a", task=None, plan=plan, title=progress.title)
    run = Run(RunControl(spec, progress, lambda *command: None))
    panel.begin(run)
    for step in range(_FIRST, _FIRST + steps):
        for state in list(progress.ranks.values()):
            progress.merge(dataclasses.replace(state, step=step, samples=4 * step))
        panel.update(run)
        time.sleep(_UPDATE_S)


def _run(size: int, plan: Plan) -> RunState:
    chance = random.Random(1)
    rows = tuple(
        {
            "epoch": epoch, "steps": 800, "samples": 204_800, "loss": 0.3 + 2 * math.exp(-epoch), "seconds": 328.0,
            "val_loss": 0.35 + 2 * math.exp(-epoch), "val_accuracy": 1 - math.exp(-epoch / 2),
        }
        for epoch in range(1, 6)
    )  # fmt: skip
    losses = [0.3 + 2 * math.exp(-step / 600) + chance.gauss(0, 0.02) for step in range(0, _FIRST, 10)]
    curve = tuple(Point(10 * i + 10, 10, loss, loss - 0.06, loss + 0.06) for i, loss in enumerate(losses))
    stages = tuple(
        {"stage": i, "first": f"blocks.{3 * i}", "last": f"blocks.{3 * i + 2}", "seconds": 1.0, "parameters": 7}
        for i in range(plan.mesh.pp if plan.mesh.pp > 1 else 0)
    )
    ranks = {rank: RankState(rank=rank, step=_FIRST) for rank in range(size)}
    progress = RunState(title="ViT (86.6 M parameters)", plan=plan.to_dict(), ranks=ranks, state="running")
    progress.started_s -= 1640
    for number in (1, 2):
        text = f"checkpoint of step {2000 * number:,} in /scratch/vit/step0000{2 * number}000"
        progress.happenings.append(Happening(progress.started_s + 820 * number, "checkpoint", text))
    for rank in range(size):
        busy = 0.30 + 0.02 * chance.random() + (0.2 if rank == SLOW else 0.0)
        idle = 0.05 + 0.1 * chance.random()
        progress.merge(RankState(
            rank=rank, state="lost" if rank == LOST else "running", host=f"node-{rank // 8}", pid=1000 + rank,
            device=f"cuda:{rank % 8}", step=_FIRST, steps_total=_LAST, epoch=6, samples=4 * _FIRST,
            loss=0.30 + 0.02 * chance.random(), samples_per_s=9.7 + 0.2 * chance.random(), memory_mib=31_204.0,
            lr=3e-4, busy_s=busy, curves={"loss": curve}, history=rows, shares=Shares(0.84 - idle, 0.13, 0.03, idle),
            stages=stages, place={axis: plan.mesh.coordinate(rank, axis) for axis in ("dp", "pp")},
        ))  # fmt: skip
    return progress
