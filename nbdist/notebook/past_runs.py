"""The list of past runs as a table, for ``%dist_runs``."""

from __future__ import annotations

import time

from nbdist.telemetry import PastRun
from nbdist.telemetry.run_view import mesh_text, table_bundle
from nbdist.telemetry.units import duration, number

__all__ = ["runs_bundle"]

_COLUMNS = ("run", "began", "what", "on", "state", "step", "loss", "validation", "took")


def runs_bundle(runs: list[PastRun]) -> dict[str, str]:
    """Runs as a table, by MIME type."""
    return table_bundle(_COLUMNS, [_row(run) for run in runs])


def _row(past: PastRun) -> tuple[str, ...]:
    run = past.overview
    total = "" if run.steps_total is None else f"/{run.steps_total:,}"
    last = run.history[-1] if run.history else {}
    measured = ", ".join(
        f"{name.removeprefix('val_')} {number(value)}" for name, value in last.items() if name.startswith("val_")
    )
    began = time.strftime("%d %b %H:%M", time.localtime(run.started_s))
    return (
        past.run_id, began, run.title, mesh_text(run.plan), run.state, f"{run.step:,}{total}", number(run.loss),
        measured or "–", duration(run.elapsed_s),
    )  # fmt: skip
