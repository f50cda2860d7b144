"""A run as static HTML and plain text, for a saved notebook and for a terminal."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from nbdist.telemetry.events import Shares
from nbdist.telemetry.rank_state import RankState
from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.svg_chart import loss_chart, value_charts
from nbdist.telemetry.units import duration, left, number

__all__ = [
    "RANK_COLUMNS",
    "SHOWN_RANKS",
    "chart_image",
    "chosen_ranks",
    "epoch_text",
    "happened",
    "history_cells",
    "html_table",
    "memory_text",
    "mesh_text",
    "rank_cells",
    "run_html",
    "run_text",
    "shares_text",
    "stage_cells",
    "summary",
    "table_bundle",
    "text_table",
]

_STAGE_COLUMNS = ("stage", "from", "to", "time", "", "parameters")
_STAGE_BAR = 20  # characters of all stages together
RANK_COLUMNS = ("rank", "device", "state", "step", "loss", "samples/s", "memory", "compute", "comm", "data", "idle")
SHOWN_RANKS = 16
"""With more ranks than this, half as many are shown: those in trouble, then the slowest."""
_SHOWN_HAPPENINGS = 8
_COUNTED = ("epoch", "steps", "samples", "loss", "seconds")
_TROUBLED = ("failed", "lost", "recovering", "slow")


def epoch_text(row: dict[str, Any]) -> str:
    """One row of the history as a line."""
    rest = "".join(f"  {key} {number(value)}" for key, value in row.items() if key not in _COUNTED)
    speed = row["samples"] / row["seconds"] if row["seconds"] else 0.0
    return (
        f"epoch {row['epoch']}  loss {number(row['loss'])}{rest}  {number(speed)} samples/s  {duration(row['seconds'])}"
    )


def mesh_text(plan: dict[str, Any]) -> str:
    """The mesh of a plan's JSON-able data: "dp=2, pp=2"."""
    return ", ".join(f"{axis}={degree}" for axis, degree in plan["mesh"].items() if degree > 1) or "dp=1"


def memory_text(rank: RankState) -> str:
    """The memory of a rank, a dash if unknown."""
    return f"{rank.memory_mib:,.0f} MiB" if rank.memory_mib else "–"


def shares_text(shares: Shares | None) -> tuple[str, str, str, str]:
    """How a rank's time splits, in percent; dashes if unknown."""
    if shares is None:
        return ("–",) * 4
    compute, communication, data, idle = (f"{share:.0%}" for share in shares)
    return compute, communication, data, idle


def summary(run: RunState) -> str:
    """The run in a line: title, state, step, loss, speed, time left."""
    total = "" if run.steps_total is None else f"/{run.steps_total}"
    parts = [f"{run.title} on {mesh_text(run.plan)}", run.state, f"step {run.step}{total}", f"loss {number(run.loss)}"]
    if run.running and run.lr is not None:
        parts.append(f"lr {number(run.lr, 3)}")
    parts += [f"{number(run.samples_per_s)} samples/s", duration(run.elapsed_s)]
    if run.eta_s is not None:
        parts.append(f"{left(run.eta_s)} left")
    return " · ".join(parts)


def chosen_ranks(run: RunState, standings: Mapping[int, str]) -> tuple[list[RankState], int]:
    """The ranks to show, and the number of others: of many ranks, those in trouble and then the slowest.

    Args:
        run: The run.
        standings: Its `RunState.standings`.
    """
    ranks = [rank for _, rank in sorted(run.ranks.items())]
    if len(ranks) <= SHOWN_RANKS:
        return ranks, 0

    def trouble(rank: RankState) -> tuple[int, float]:
        standing = standings[rank.rank]
        return (_TROUBLED.index(standing) if standing in _TROUBLED else len(_TROUBLED)), -rank.busy_s

    shown = sorted(ranks, key=trouble)[: SHOWN_RANKS // 2]
    return shown, len(ranks) - len(shown)


def rank_cells(run: RunState) -> list[tuple[str, ...]]:
    """A row for each rank that is shown, in the order of `RANK_COLUMNS`."""
    standings = run.standings
    ranks, others = chosen_ranks(run, standings)
    rows: list[tuple[str, ...]] = [
        (
            str(rank.rank), rank.device, standings[rank.rank], str(rank.step), number(rank.loss),
            number(rank.samples_per_s), memory_text(rank), *shares_text(rank.shares),
        )
        for rank in ranks
    ]  # fmt: skip
    if others:
        rows.append((f"{others} others", *[""] * (len(RANK_COLUMNS) - 1)))
    return rows


def happened(run: RunState) -> list[str]:
    """The error, if any, and the newest happenings."""
    texts = [
        f"{duration(max(0.0, happening.time_s - run.started_s))}: {happening.text}"
        if happening.kind in ("command", "checkpoint")
        else happening.text
        for happening in run.happenings
    ]
    earlier = len(texts) - _SHOWN_HAPPENINGS
    shown = [f"{earlier} earlier events are in the record", *texts[-_SHOWN_HAPPENINGS:]] if earlier > 0 else texts
    return [*run.error.splitlines(), *shown]


def history_cells(run: RunState) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The history, columns and rows."""
    columns = tuple(dict.fromkeys(column for row in run.history for column in row))  # a stopped row has no val_loss
    rows = [tuple(number(row.get(column)) for column in columns) for row in run.history]
    return columns, rows


def stage_cells(run: RunState) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The stages of a pipeline, columns and rows, with a bar for the share of time that each takes."""
    seconds = sum(stage["seconds"] for stage in run.stages)
    parameters = sum(stage["parameters"] for stage in run.stages)
    cells: list[tuple[str, ...]] = []
    for stage in run.stages:
        share = stage["seconds"] / seconds if seconds else 1 / len(run.stages)
        held = f"{stage['parameters']:,} ({stage['parameters'] / parameters:.0%})" if parameters else "0"
        bar = "█" * max(1, round(share * _STAGE_BAR))
        cells.append((str(stage["stage"]), stage["first"], stage["last"], f"{share:.0%}", bar, held))
    return _STAGE_COLUMNS, cells


def text_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table, its columns aligned to the right."""
    widths = [max(len(cells[i]) for cells in [columns, *rows]) for i in range(len(columns))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in [columns, *rows]
    ]


def run_text(run: RunState) -> str:
    """The run as plain text: a summary line, the history and the ranks; every line begins with "nbdist"."""
    lines = [summary(run), *happened(run)]
    columns, rows = history_cells(run)
    if rows:
        lines += text_table(columns, rows)
    if run.stages:
        lines += text_table(*stage_cells(run))
    lines += text_table(RANK_COLUMNS, rank_cells(run))
    return "\n".join(f"nbdist: {line}" for line in lines)


def table_bundle(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> dict[str, str]:
    """A table as a notebook displays it, by MIME type."""
    lines = text_table(columns, rows)
    return {
        "text/html": f'<div class="nbdist">{html_table(columns, rows)}</div>',
        "text/plain": "\n".join(f"nbdist: {line}" for line in lines),
    }


def html_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table as HTML, with its cells escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def chart_image(chart: str) -> str:
    """A chart as an ``<img>``: untrusted notebooks remove an ``<svg>``."""
    words = chart.partition("<title>")[2].partition("</title>")[0]
    return f'<img alt="{words}" src="data:image/svg+xml;base64,{base64.b64encode(chart.encode()).decode()}">'


def run_html(run: RunState) -> str:
    """The run as static HTML without scripts or styles, in one ``<div class="nbdist">`` on a single line."""
    columns, rows = history_cells(run)
    title, _, rest = summary(run).partition(" · ")
    parts = [f"<p><b>{escape(title)}</b> · {escape(rest)}</p>"]
    lines = happened(run)
    if lines:
        parts.append(f"<p>{'<br>'.join(map(escape, lines))}</p>")
    charts = [loss_chart(run, width=480), *value_charts(run, width=280)]
    if any(charts):
        parts.append(f"<p>{''.join(chart_image(chart) for chart in charts if chart)}</p>")
    if rows:
        parts.append(html_table(columns, rows))
    if run.stages:
        parts.append(html_table(*stage_cells(run)))
    parts.append(html_table(RANK_COLUMNS, rank_cells(run)))
    return f'<div class="nbdist">{"".join(parts)}</div>'
