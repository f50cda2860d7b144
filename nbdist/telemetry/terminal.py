"""A run in a terminal, drawn live in place with rich (progress bar, table of ranks); its last state stays."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.run_view import RANK_COLUMNS, happened, history_cells, rank_cells, stage_cells, summary

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["TerminalView"]

_INTERVAL_S = 0.25
_SHOWN_ROWS = 5
_STYLES = {"failed": "red", "lost": "red", "slow": "yellow", "recovering": "magenta", "paused": "yellow"}


class TerminalView:
    """Draws a run on each call, at most four times a second.

    Args:
        stream: The terminal; standard output by default.
    """

    def __init__(self, stream: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console: Console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._next_s = 0.0

    def draw(self, run: RunState) -> None:
        """Draw the run's current state; after its end it is ordinary output."""
        now_s = time.monotonic()
        if run.running and now_s < self._next_s:
            return
        self._next_s = now_s + _INTERVAL_S
        if not self._live.is_started and run.running:
            self._live.start()
        if run.running:
            self._live.update(_picture(run), refresh=True)
        else:
            self._live.update("", refresh=True)
            self.close()
            self._console.print(_picture(run))

    def close(self) -> None:
        """End the live display. Can be called twice."""
        self._live.stop()


def _picture(run: RunState) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def table(columns: tuple[str, ...], rows: list[tuple[str, ...]], styled: str = "") -> Table:
        made = Table(box=None, padding=(0, 1, 0, 1), header_style="dim", pad_edge=False)
        for column in columns:
            made.add_column(column, justify="right", no_wrap=True)
        for cells in rows:
            state = cells[columns.index(styled)] if styled else ""
            made.add_row(*(Text(cell) for cell in cells), style=_STYLES.get(state, ""))
        return made

    title, _, rest = summary(run).partition(" · ")
    parts: list[RenderableType] = [Text.assemble((title, "bold"), " · ", rest)]
    if run.running and run.steps_total:
        parts.append(ProgressBar(total=run.steps_total, completed=run.step))
    parts += [Text(line, style="red" if line in run.error else "dim") for line in happened(run)]
    columns, rows = history_cells(run)
    if rows:
        parts.append(table(columns, rows[-_SHOWN_ROWS:] if run.running else rows))
    if run.stages:
        parts.append(table(*stage_cells(run)))
    parts.append(table(RANK_COLUMNS, rank_cells(run), "state"))
    return Group(*parts)
