"""The panel's contents as JSON-able data: all texts are made here, the front end only places them."""

from __future__ import annotations

import statistics
from typing import Any

from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.command_table import COMMANDS
from nbdist.telemetry.run_view import chosen_ranks, memory_text, mesh_text
from nbdist.telemetry.svg_chart import loss_chart, value_charts
from nbdist.telemetry.units import duration, left, number

__all__ = ["buttons", "charts", "events", "head", "rows"]

_EVENTS = 5
_STALLED_S = 5.0


def buttons() -> list[dict[str, str]]:
    """The buttons that give a command, in their order."""
    return [{"name": name, "label": kind.label, "title": kind.title} for name, kind in COMMANDS.items() if kind.label]


def head(run: RunState) -> dict[str, Any]:
    """The whole run: title, state, progress, speed, time left."""
    step, total, epochs = run.step, run.steps_total, run.plan.get("epochs")
    eta = run.eta_s
    return {
        "title": f"{run.title} on {mesh_text(run.plan)}",
        "state": run.state,
        "share": None if not total else min(1.0, step / total),
        "lr": "" if run.lr is None else f"{run.lr:.4g}",
        "commands": sum(happening.kind == "command" for happening in run.happenings),
        "facts": [
            ["step", f"{step:,}" + ("" if total is None else f" of {total:,}")],
            ["epoch", f"{run.epoch}" + (f" of {epochs}" if epochs else "")],
            ["loss", number(run.loss)],
            ["samples/s", number(run.samples_per_s)],
            ["elapsed", duration(run.elapsed_s)],
            ["left", "–" if eta is None else left(max(eta, 0.0)) if run.state == "running" else "–"],
        ],
    }


def rows(run: RunState) -> dict[str, Any]:
    """One row for each rank that is shown, in groups; with many ranks also a cell for each: its standing, its heat.

    A row is the rank, its standing, its title, its device, its step, its share of all steps or None, its loss,
    its speed, its memory, and the percents of its time for compute, communication, data and idle.
    """
    standings = run.standings
    shown, others = chosen_ranks(run, standings)
    hosts = len({rank.host for rank in run.ranks.values()}) > 1
    total = run.steps_total
    groups: dict[str, list[list[Any]]] = {}
    for rank in shown:
        where = f"{rank.host} {rank.device}" if hosts else rank.device
        groups.setdefault("" if others else _stage(run, rank), []).append([
            rank.rank, standings[rank.rank], f"rank {rank.rank}: process {rank.pid} on {rank.host}", where,
            f"{rank.step:,}", None if not total else min(1.0, rank.step / total), number(rank.loss),
            number(rank.samples_per_s), memory_text(rank),
            None if rank.shares is None else [round(100 * share) for share in rank.shares],
        ])  # fmt: skip
    strip = [[standings[number] for number in sorted(standings)], _heats(run)] if others else []
    return {"groups": [[name, groups[name]] for name in sorted(groups)], "strip": strip}


def charts(run: RunState) -> list[str]:
    """SVGs of the loss, metrics, and what steps log, if they have data."""
    drawn = [loss_chart(run, width=450, height=150), *value_charts(run, width=270, height=150)]
    return [chart for chart in drawn if chart]


def events(run: RunState) -> list[list[str]]:
    """The newest happenings, each with its kind; last a current error or stall."""
    lines = [
        [happening.kind, f"{duration(max(0.0, happening.time_s - run.started_s))}  {happening.text}"]
        for happening in run.happenings[-_EVENTS:]
    ]
    if run.error:
        lines.append(["error", run.error])
    stalled_s = run.stalled_s
    if stalled_s > _STALLED_S:
        behind = [rank for rank, standing in sorted(run.standings.items()) if standing != "waiting"]
        who = ", ".join(map(str, behind[:8])) if len(behind) < len(run.ranks) else ""
        lines.append(
            ["stalled", f"no step for {stalled_s:.0f} s" + (f": the others wait for rank {who}" if who else "")]
        )
    return lines


def _stage(run: RunState, rank: RankState) -> str:
    """The stages of a pipeline on a rank, and the modules in each."""
    if not run.stages or not rank.place:
        return ""
    mine = [stage for stage in run.stages if stage["stage"] % run.plan["mesh"].get("pp", 1) == rank.place["pp"]]
    return "; ".join(f"stage {stage['stage']}: {stage['first']} to {stage['last']}" for stage in mine)


def _heats(run: RunState) -> list[int]:
    """The busy time of each rank, in their order, relative to the busiest one, from 0 to 100."""
    busy = [run.ranks[number].busy_s for number in sorted(run.ranks)]
    busiest = max(busy) or 1.0
    low = min(statistics.median(busy), busiest) / 2
    scale = 100 / max(busiest - low, 1e-9)
    return [round(scale * max(0.0, busy_s - low)) for busy_s in busy]
