"""A run as static HTML and as plain text: what remains in a saved notebook, and what a terminal shows."""

from __future__ import annotations

from html import escape
from typing import Any

from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.state import RankState

__all__ = ["duration", "epoch_text", "memory_text", "mesh_text", "number", "run_html", "run_text", "text_table"]

_STAGE_COLUMNS = ("stage", "from", "to", "time", "", "parameters")
_STAGE_BAR = 20  # characters of all stages together
_RANK_COLUMNS = ("rank", "device", "state", "step", "loss", "samples/s", "memory")


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: ``1234.5`` as "1,234", small ones with `digits` significant digits, None as a dash."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds for people: "0.8 s", "12.3 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def epoch_text(row: dict[str, Any]) -> str:
    """One row of the history as a line."""
    rest = "".join(f"  {key} {number(value)}" for key, value in row.items() if key.startswith("val_"))
    speed = row["samples"] / row["seconds"] if row["seconds"] else 0.0
    return (
        f"epoch {row['epoch']}  loss {number(row['loss'])}{rest}  {number(speed)} samples/s  {duration(row['seconds'])}"
    )


def mesh_text(plan: dict[str, Any]) -> str:
    """The mesh of a plan that has become data: "dp=2, pp=2"."""
    return ", ".join(f"{axis}={degree}" for axis, degree in plan["mesh"].items() if degree > 1) or "dp=1"


def memory_text(rank: RankState) -> str:
    """The memory of a rank, a dash where it has not said."""
    return f"{rank.memory_mib:,.0f} MiB" if rank.memory_mib else "–"


def _summary(run: RunState) -> str:
    total = "" if run.steps_total is None else f"/{run.steps_total}"
    parts = [f"{run.title} on {mesh_text(run.plan)}", run.state, f"step {run.step}{total}", f"loss {number(run.loss)}"]
    return " · ".join([*parts, f"{number(run.samples_per_s)} samples/s", duration(run.elapsed_s)])


def _rank_cells(rank: RankState) -> tuple[str, ...]:
    return (
        str(rank.rank), rank.device, rank.state, str(rank.step), number(rank.loss),
        number(rank.samples_per_s), memory_text(rank),
    )  # fmt: skip


def _history_cells(run: RunState) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = tuple(dict.fromkeys(column for row in run.history for column in row))  # a stopped row has no val_loss
    rows = [tuple(number(row.get(column)) for column in columns) for row in run.history]
    return columns, rows


def _stage_cells(run: RunState) -> list[tuple[str, ...]]:
    """The stages of a pipeline, with a bar for the share of time that each takes."""
    seconds = sum(stage["seconds"] for stage in run.stages)
    parameters = sum(stage["parameters"] for stage in run.stages)
    cells: list[tuple[str, ...]] = []
    for stage in run.stages:
        share = stage["seconds"] / seconds if seconds else 1 / len(run.stages)
        held = f"{stage['parameters']:,} ({stage['parameters'] / parameters:.0%})" if parameters else "0"
        bar = "█" * max(1, round(share * _STAGE_BAR))
        cells.append((str(stage["stage"]), stage["first"], stage["last"], f"{share:.0%}", bar, held))
    return cells


def text_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table, its columns aligned to the right."""
    widths = [max(len(cells[i]) for cells in [columns, *rows]) for i in range(len(columns))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in [columns, *rows]
    ]


def run_text(run: RunState) -> str:
    """The run as plain text: a summary line, the history and the ranks; every line begins with "nbdist"."""
    lines = [_summary(run)]
    lines += [*run.error.splitlines(), *run.notes]
    columns, rows = _history_cells(run)
    if rows:
        lines += text_table(columns, rows)
    if run.stages:
        lines += text_table(_STAGE_COLUMNS, _stage_cells(run))
    lines += text_table(_RANK_COLUMNS, [_rank_cells(rank) for _, rank in sorted(run.ranks.items())])
    return "\n".join(f"nbdist: {line}" for line in lines)


def _html_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def run_html(run: RunState) -> str:
    """The run as static HTML without scripts or styles, in one ``<div class="nbdist">`` on a single line."""
    columns, rows = _history_cells(run)
    parts = [f"<p><b>{escape(_summary(run))}</b></p>"]
    said = [*run.error.splitlines(), *run.notes]
    if said:
        parts.append(f"<p>{'<br>'.join(map(escape, said))}</p>")
    if rows:
        parts.append(_html_table(columns, rows))
    if run.stages:
        parts.append(_html_table(_STAGE_COLUMNS, _stage_cells(run)))
    parts.append(_html_table(_RANK_COLUMNS, [_rank_cells(rank) for _, rank in sorted(run.ranks.items())]))
    return f'<div class="nbdist">{"".join(parts)}</div>'
