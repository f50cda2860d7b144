"""The timeline of one pipeline step, measured on each rank: as SVG, as text, and as a Chrome trace for Perfetto."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from nbdist.errors import PlanError
from nbdist.telemetry.events import Work
from nbdist.telemetry.record import records

__all__ = ["Timeline", "bubble"]

_LETTERS = {"forward": "F", "backward": "B"}
_COLOURS = {  # by kind, for a rank's first stage (white text) and its second (black text); readable on any theme
    "forward": ("#1976d2", "#90caf9"),
    "backward": ("#2e7d32", "#a5d6a7"),
}
_TEXT_COLUMNS = 66
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _GAP = 900, 64, 84, 54, 28, 6
_STYLE = (  # greys readable on white and on black: an image does not know its page's theme
    "text{font:14px system-ui,sans-serif;fill:#7a7a7a}.head{font-size:15px}.mid{text-anchor:middle}"
    ".end{text-anchor:end}.on0,.on1{font-size:13px;text-anchor:middle;pointer-events:none;fill:#fff}.on1{fill:#111}"
    ".lane{fill:#808080;fill-opacity:.13}line{stroke:#808080;stroke-width:.5;stroke-opacity:.6}"
)


def bubble(ranks: int, microbatches: int, stages_per_rank: int = 1) -> float:
    """The share of a step in which ranks of a pipeline must wait if all work is equal: (p - 1) / (v m + p - 1).

    For gpipe and 1f1b v is 1, for interleaved it is `stages_per_rank`.
    """
    return (ranks - 1) / (stages_per_rank * microbatches + ranks - 1)


class Timeline:
    """What the ranks of a pipeline did in one step; shows itself in a notebook.

    Args:
        step: The step, counted from 1.
        work: What each rank did, in any order; times are seconds of one clock.

    Raises:
        PlanError: No rank did any work.
    """

    def __init__(self, step: int, work: Mapping[int, Iterable[Work]]) -> None:
        self.step = step
        self.work = {rank: sorted(map(Work._make, items), key=_start) for rank, items in sorted(work.items())}
        everything = [item for items in self.work.values() for item in items]
        if not everything:
            raise PlanError(f"step {step} has no work of a pipeline: a timeline needs a strategy with pp of 2 or more.")
        self.start_s = min(item.start_s for item in everything)
        self.end_s = max(item.end_s for item in everything)

    @classmethod
    def of_record(cls, run_id: str, step: int | None = None) -> Timeline:
        """Read a step from a past run's record, by default the newest one that all ranks reported.

        Raises:
            PlanError: The record is not there, or holds no such step of a pipeline.
        """
        files = sorted((records() / run_id).glob("rank*.jsonl"))
        by_step: dict[int, dict[int, list[Work]]] = {}
        for path in files:
            for event in _worked(path):
                by_step.setdefault(event["step"], {})[event["rank"]] = [Work._make(item) for item in event["work"]]
        whole = [number for number, work in by_step.items() if len(work) == len(files)]
        if not whole or step not in (None, *whole):
            known = f"steps {', '.join(map(str, sorted(whole)))}" if whole else "no step of a pipeline"
            wanted = "" if step is None else f" step {step} of"
            raise PlanError(f"no timeline for{wanted} run {run_id!r}: {records() / run_id} holds {known}.")
        chosen = max(whole) if step is None else step
        return cls(chosen, by_step[chosen])

    @property
    def span_s(self) -> float:
        """From the first rank's start to the last one's end, in seconds."""
        return self.end_s - self.start_s

    @property
    def idle(self) -> float:
        """The part of all ranks' time in which they waited, 0 to 1."""
        idle = self.idle_by_rank
        return sum(idle.values()) / len(idle)

    @property
    def idle_by_rank(self) -> dict[int, float]:
        """The part of the span in which each rank waited, 0 to 1."""
        busy = {rank: sum(item.end_s - item.start_s for item in items) for rank, items in self.work.items()}
        return {rank: 1 - seconds / self.span_s if self.span_s else 0.0 for rank, seconds in busy.items()}

    @property
    def bubble(self) -> float:
        """The result of the formula `bubble` for this pipeline: with equal work and free messages."""
        stages = {rank: {item.stage for item in items} for rank, items in self.work.items()}
        most = max(map(len, stages.values()))
        microbatches = len({item.microbatch for items in self.work.values() for item in items})
        return bubble(math.ceil(len(set().union(*stages.values())) / most), microbatches, most)

    @property
    def _headline(self) -> str:
        return (
            f"step {self.step:,} · {self.span_s * 1e3:,.4g} ms · idle {self.idle:.0%}"
            f" · bubble {self.bubble:.0%} by formula"
        )

    def to_chrome(self) -> dict[str, Any]:
        """The step in the trace-event format of chrome://tracing and ui.perfetto.dev: a process a rank."""
        events: list[dict[str, Any]] = []
        for rank, items in self.work.items():
            events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
            for stage in sorted({item.stage for item in items}):
                name = {"name": f"stage {stage}"}
                events.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": stage, "args": name})
            events += [self._trace_event(rank, item) for item in items]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def _trace_event(self, rank: int, item: Work) -> dict[str, Any]:
        return {
            "name": f"{item.kind} {item.microbatch}", "cat": item.kind, "ph": "X", "pid": rank, "tid": item.stage,
            "ts": round((item.start_s - self.start_s) * 1e6, 3), "dur": round((item.end_s - item.start_s) * 1e6, 3),
            "args": {"step": self.step, "stage": item.stage, "microbatch": item.microbatch},
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write `to_chrome` as a JSON file, to be opened in ui.perfetto.dev."""
        Path(path).write_text(json.dumps(self.to_chrome()), encoding="utf-8")

    def __repr__(self) -> str:
        rows = [
            f"rank {rank:<2}|{self._text_row(items)}| idle {self.idle_by_rank[rank]:.0%}"
            for rank, items in self.work.items()
        ]
        kinds = ", ".join(f"{_LETTERS[kind]} {kind}" for kind in self._kinds)
        return "\n".join([self._headline, *rows, f"{kinds}; then the microbatch"])

    def _text_row(self, items: list[Work]) -> str:
        """Letters and numbers to scale: each piece of work as wide as its time, its label cut to fit."""
        row = ["."] * _TEXT_COLUMNS
        scale = _TEXT_COLUMNS / (self.span_s or 1.0)
        for item in items:
            first = min(int((item.start_s - self.start_s) * scale + 0.5), _TEXT_COLUMNS - 1)
            last = max(int((item.end_s - self.start_s) * scale + 0.5), first + 1)
            label = f"{_LETTERS[item.kind]}{item.microbatch}"
            width = last - first
            row[first:last] = (label if len(label) <= width else label[:1]).ljust(width, "-")
        return "".join(row)

    @property
    def _kinds(self) -> list[str]:
        present = {item.kind for items in self.work.values() for item in items}
        return [kind for kind in _LETTERS if kind in present]

    def _repr_html_(self) -> str:
        # inside an <img>: untrusted notebooks remove an inline <svg>
        picture = base64.b64encode(self.to_svg().encode()).decode()
        return (
            f'<div class="nbdist"><img alt="{escape(self._title)}" style="width:100%;max-width:{_WIDTH}px" '
            f'src="data:image/svg+xml;base64,{picture}"></div>'
        )

    def to_svg(self) -> str:
        """The step as SVG, readable on white and on black: a row a rank, a box a piece of work."""
        bottom = _TOP + len(self.work) * (_ROW + _GAP)
        rows = [self._svg_row(_TOP + i * (_ROW + _GAP), rank) for i, rank in enumerate(self.work)]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 24}" width="{_WIDTH}" '
            f'height="{bottom + 24}" role="img" aria-label="{escape(self._title)}"><style>{_STYLE}</style>'
            f'<text y="14" class="head">{escape(self._headline)}</text>'
            f"{self._svg_legend()}{self._svg_axis(bottom)}{''.join(rows)}</svg>"
        )

    @property
    def _title(self) -> str:
        return f"What each rank of the pipeline did: {self._headline}"

    def _svg_legend(self) -> str:
        parts, x = [], 0
        shades = sorted({shade for items in self.work.values() for shade in _shades(items).values()})
        for kind in self._kinds:
            for shade in shades:
                parts.append(f'<rect x="{x}" y="27" width="12" height="12" rx="2" fill="{_COLOURS[kind][shade]}"/>')
                x += 14
            parts.append(f'<text x="{x + 3}" y="38">{kind}</text>')
            x += 24 + 8 * len(kind)
        note = "number: microbatch" + ("; light: second stage of the rank" if len(shades) > 1 else "")
        return "".join(parts) + f'<text x="{x}" y="38">{note}</text>'

    def _svg_axis(self, bottom: int) -> str:
        parts = []
        for tick_ms in _ticks(self.span_s * 1e3):
            x = self._x(self.start_s + tick_ms / 1e3)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{_TOP - 4}" y2="{bottom}"/>')
            unit = " ms" if tick_ms == 0 else ""
            parts.append(f'<text x="{x}" y="{bottom + 16}" class="mid">{tick_ms:g}{unit}</text>')
        return "".join(parts)

    def _svg_row(self, top: int, rank: int) -> str:
        middle, lane = top + _ROW // 2 + 5, _WIDTH - _LEFT - _RIGHT
        items, shades = self.work[rank], _shades(self.work[rank])
        boxes = "".join(self._svg_box(top, item, shades[item.stage]) for item in items)
        return (
            f'<text y="{middle}">rank {rank}</text>'
            f'<rect x="{_LEFT}" y="{top}" width="{lane}" height="{_ROW}" class="lane"/>{boxes}'
            f'<text x="{_WIDTH}" y="{middle}" class="end">idle {self.idle_by_rank[rank]:.0%}</text>'
        )

    def _svg_box(self, top: int, item: Work, shade: int) -> str:
        x, end = self._x(item.start_s), self._x(item.end_s)
        width = round(max(end - x - 0.6, 0.6), 1)  # a thin gap between neighbours
        took = f"{(item.end_s - item.start_s) * 1e3:.3g} ms"
        title = f"{item.kind}, microbatch {item.microbatch}, stage {item.stage}: {took}"
        box = (
            f'<rect x="{x}" y="{top}" width="{width}" height="{_ROW}" rx="2" fill="{_COLOURS[item.kind][shade]}">'
            f"<title>{title}</title></rect>"
        )
        label = str(item.microbatch)
        if width < 8 * len(label) + 1:
            return box
        return f'{box}<text x="{x + width / 2:.1f}" y="{top + _ROW // 2 + 5}" class="on{shade}">{label}</text>'

    def _x(self, time_s: float) -> float:
        share = (time_s - self.start_s) / self.span_s if self.span_s else 0.0
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _start(item: Work) -> float:
    return item.start_s


def _shades(items: Iterable[Work]) -> dict[int, int]:
    """The shade of each stage of one rank: 0 and 1 in turn."""
    return {stage: i % 2 for i, stage in enumerate(sorted({item.stage for item in items}))}


def _ticks(span: float) -> list[float]:
    """Round numbers from 0 to `span`, five to ten of them."""
    if span <= 0:
        return [0.0]
    power: float = 10 ** math.floor(math.log10(span / 5))
    unit = next(unit for unit in (5 * power, 2 * power, power) if span / unit >= 5)
    return [round(i * unit, 9) for i in range(int(span / unit) + 1)]


def _worked(path: Path) -> list[dict[str, Any]]:
    """The `Worked` events of one rank's record, without the torn last line of a killed rank."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if '"event": "Worked"' in line and line.endswith("\n")]
