"""The panel of many engines, of a pipeline, of a failure: the real widget in a real browser, fed a state by hand."""

from __future__ import annotations

import re

from playwright.sync_api import expect

MAKE = """import math, random
from nbdist.cluster.run import Run
from nbdist.notebook.dashboard import PanelDashboard
from nbdist.plan import Plan
from nbdist.telemetry import Happening, Point, RankState, RunState, Shares
random.seed(1)
def made(size, mesh, stages=(), **changes):
    plan = Plan.create(ranks=size, cores=size, epochs=10, strategy=mesh)
    losses = [0.3 + 2 * math.exp(-step / 400) + random.gauss(0, 0.03) for step in range(0, 4000, 10)]
    curve = tuple(Point(10 * i + 10, 10, loss, loss - 0.05, loss + 0.05) for i, loss in enumerate(losses))
    rows = tuple({"epoch": e, "steps": 800, "samples": 204800, "loss": 2 * math.exp(-e) + 0.3, "seconds": 60.0,
                  "val_loss": 2 * math.exp(-e) + 0.35, "val_accuracy": 1 - math.exp(-e / 2)} for e in range(1, 5))
    ranks = {}
    for r in range(size):
        busy = 0.08 + random.random() * 0.01 + (0.05 if r == 41 else 0)
        idle = max(0.0, 0.13 - busy) / 0.15
        ranks[r] = RankState(rank=r, state="lost" if r == 17 else "running", host=f"node-{r // 8}", pid=1000 + r,
            device=f"cuda:{r % 8}" if size > 8 else "cpu", step=4000, steps_total=8000, epoch=5,
            samples=16000 * (r + 1), loss=0.31 + random.random() / 50, samples_per_s=430 + random.random() * 9,
            memory_mib=31_204.0 if size > 8 else 812.0, lr=3e-4, busy_s=busy, curve=curve, history=rows,
            shares=Shares(0.84 - idle, 0.13, 0.03, idle), stages=stages,
            place={"pp": plan.mesh.coordinate(r, "pp")})
    progress = RunState(title="ViT (86.6 M parameters)", plan=plan.to_dict(), ranks=ranks, state="running")
    progress.started_s -= 1312
    for name, value in changes.items():
        setattr(progress, name, value)
    return Run("20261126-101500-4f2a", plan, progress, lambda *order: None)"""
MANY = """run = made(64, "dp=64")
start = run.progress.started_s
for i in (1, 2):
    text = f"checkpoint of step {i},000 in /scratch/vit/step0000{i}000"
    run.progress.happenings.append(Happening(start + 600 * i, "checkpoint", text))
PanelDashboard().update(run)"""
PIPELINE = """stages = tuple(
    {"stage": i, "first": f"blocks.{3 * i}", "last": f"blocks.{3 * i + 2}", "seconds": 1.0, "parameters": 7}
    for i in range(4))
PanelDashboard().update(made(8, "dp=2,pp=4", stages))"""


def test_64_engines_stay_on_one_screen(open_notebook):
    """A cell each in a strip; rows for who is lost, slow, and the slowest of the others. No 64 processes run here."""
    with open_notebook("many.ipynb", MAKE, MANY) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        panel = sheet.panel
        cells = panel.locator(".nbdist-strip [data-rank]")
        expect(cells).to_have_count(64)
        ranks = panel.locator("tr[data-rank]").evaluate_all(
            "rows => rows.map(row => [row.dataset.rank, row.dataset.state])"
        )
        assert 8 == len(ranks)
        assert [["17", "lost"], ["41", "slow"]] == ranks[:2]
        expect(panel.locator(".nbdist-strip [data-rank='17']")).to_have_attribute("aria-label", "rank 17: lost")
        assert panel.bounding_box()["height"] < 640
        sheet.shot("64-engines")


def test_a_pipeline_is_grouped_by_stage(open_notebook):
    """Each group says which modules it holds."""
    with open_notebook("pipeline.ipynb", MAKE, PIPELINE) as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        lines = sheet.panel.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => row.dataset.rank ?? row.innerText)"
        )
        assert [f"stage {i}: blocks.{3 * i} to blocks.{3 * i + 2}" for i in range(4)] == lines[::3]
        assert sorted(map(str, range(8))) == sorted(line for line in lines if re.fullmatch(r"\d", line))
        sheet.shot("pipeline")
