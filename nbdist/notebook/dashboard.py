"""The dashboard: a run drawn live, as a widget (panel) in a notebook or as text; at the end static HTML and text."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from IPython.display import display

from nbdist.cluster import Run
from nbdist.errors import NbdistError, PlanError
from nbdist.notebook import panel_view
from nbdist.telemetry import run_html, run_text
from nbdist.telemetry.command_table import COMMANDS
from nbdist.telemetry.run_view import SHOWN_RANKS, epoch_text
from nbdist.telemetry.terminal import TerminalView
from nbdist.upstream.ipython_private import answer_while_busy

__all__ = [
    "LineDashboard",
    "PanelDashboard",
    "TerminalDashboard",
    "has_front_end",
    "load_panel",
    "make_dashboard",
    "remains",
    "show_run",
]

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_HERE = Path(__file__).parent
_SELDOM_EVERY_S = 1.0
"""How often charts are drawn, and the ranks where they are many: each then compares all of them."""
_KEEP_EVERY_S = 10.0
"""How often static HTML is put beside the live panel, for a notebook that is saved before the end."""
_panels: weakref.WeakKeyDictionary[Run, PanelDashboard] = weakref.WeakKeyDictionary()


def has_front_end(shell: Any) -> bool:
    """Whether `shell` runs in a kernel, so that what it displays can change later."""
    return getattr(shell, "kernel", None) is not None


def load_panel() -> None:
    """Import the panel's libraries in the background, so that the first run need not wait for them."""
    threading.Thread(target=_load_panel, daemon=True, name="nbdist-panel").start()


def _load_panel() -> None:
    with contextlib.suppress(Exception):  # drawing the panel raises the error again
        _panel_class()


def make_dashboard(shell: Any, background: bool = False) -> LineDashboard | PanelDashboard | TerminalDashboard:
    """A panel in a notebook, a live view in a terminal, else lines.

    Args:
        shell: The IPython shell.
        background: Whether the user works on in the terminal meanwhile.
    """
    if has_front_end(shell):
        return PanelDashboard()
    return TerminalDashboard() if sys.stdout.isatty() and not background else LineDashboard()


def show_run(run: Run) -> None:
    """Display a run: its live panel while it runs, else static HTML and text."""
    panel = _panels.get(run)
    if panel is None or not run.progress.running:
        display(remains(run), raw=True)
    else:
        panel.show(run)


class LineDashboard:
    """Prints a line for each epoch, and a summary at the end."""

    def __init__(self) -> None:
        self._rows = 0

    def begin(self, run: Run) -> None:
        """Called by the cell that asks for the run."""
        if run.state == "queued":
            print(f"nbdist: run {run.run_id} is queued, it begins when the run before it has ended", flush=True)

    def update(self, run: Run) -> None:
        """Called by the monitor, from its thread."""
        for row in run.history[self._rows :]:
            print(f"nbdist: {epoch_text(row)}", flush=True)
            self._rows += 1
        if not run.progress.running:
            print(run_text(run.progress).splitlines()[0], flush=True)


class TerminalDashboard:
    """Redraws the run in place in the terminal, until it has ended."""

    def __init__(self) -> None:
        self._view = TerminalView()

    def begin(self, run: Run) -> None:
        """Called by the cell that asks for the run."""

    def update(self, run: Run) -> None:
        """Called by the monitor, from its thread."""
        self._view.draw(run.progress)


class PanelDashboard:
    """One widget for one run, replaced at its end by static HTML and text, which a saved notebook shows."""

    def __init__(self) -> None:
        self._widget: Any = None
        self._displays: list[str] = []
        self._lock = threading.RLock()  # the monitor's thread and the cell's
        self._seldom_due_s = 0.0
        self._keep_due_s = time.monotonic() + _KEEP_EVERY_S
        self._checkpoints = 0
        self._over = False

    def begin(self, run: Run) -> None:
        """Called by the cell that starts the run; afterwards other cells can show the panel too."""
        with self._lock:
            if self._widget is None:
                self._widget = _make_widget(run)
                _panels[run] = self
                self.show(run)

    def update(self, run: Run) -> None:
        """Called by the monitor, from its thread, several times a second."""
        with self._lock:
            if self._over:
                return
            self.begin(run)
            self._draw(run)
            if not run.progress.running:
                self._over = True
                self._replace(remains(run))

    def show(self, run: Run) -> None:
        """Display the panel in the running cell."""
        with self._lock:
            bundle = {**_live(self._widget), **remains(run)} if run.progress.running else remains(run)
            self._displays.append(display(bundle, raw=True, display_id=True).display_id)

    def _draw(self, run: Run) -> None:
        """Send the changes, in one message."""
        progress, now_s = run.progress, time.monotonic()
        with self._widget.hold_sync():
            due = now_s >= self._seldom_due_s or not progress.running
            self._widget.head = panel_view.head(progress)
            if due or len(progress.ranks) <= SHOWN_RANKS:
                self._widget.rows = panel_view.rows(progress)
            self._widget.events = panel_view.events(progress)
            if due:
                self._seldom_due_s = now_s + _SELDOM_EVERY_S
                self._widget.charts = panel_view.charts(progress)
        checkpoints = sum(happening.kind == "checkpoint" for happening in progress.happenings)
        if checkpoints > self._checkpoints and now_s >= self._keep_due_s:
            self._checkpoints, self._keep_due_s = checkpoints, now_s + _KEEP_EVERY_S
            self._replace({**_live(self._widget), **remains(run)})

    def _replace(self, bundle: dict[str, Any]) -> None:
        for display_id in self._displays:
            display(bundle, raw=True, display_id=display_id, update=True)


def remains(run: Run) -> dict[str, str]:
    """The run as static HTML and as text, by MIME type; needs no kernel."""
    return {"text/html": run_html(run.progress), "text/plain": run_text(run.progress)}


def _live(widget: Any) -> dict[str, Any]:
    # Written out, because widgets of ipywidgets 7 do not build this bundle.
    return {_WIDGET_VIEW: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}


@functools.cache
def _panel_class() -> Any:
    import anywidget
    import traitlets

    class Panel(anywidget.AnyWidget):
        _esm = _HERE / "dashboard.js"
        _css = _HERE / "dashboard.css"
        head = traitlets.Dict().tag(sync=True)
        rows = traitlets.Dict().tag(sync=True)
        charts: Any = traitlets.List().tag(sync=True)
        events: Any = traitlets.List().tag(sync=True)
        reply = traitlets.Dict().tag(sync=True)
        buttons: Any = traitlets.List().tag(sync=True)
        received = traitlets.Int(0).tag(sync=True)

    return Panel


def _make_widget(run: Run) -> Any:
    view = run.progress
    panel = _panel_class()(
        head=panel_view.head(view), rows=panel_view.rows(view), charts=panel_view.charts(view),
        events=panel_view.events(view), reply={"number": 0, "text": ""}, buttons=panel_view.buttons(),
    )  # fmt: skip
    panel.on_msg(lambda widget, content, _buffers: _apply_click(widget, run, content))
    answer_while_busy(panel)
    return panel


def _apply_click(panel: Any, run: Run, content: dict[str, Any]) -> None:
    """Send the command of a clicked button to the run; the panel shows an error."""
    command, value = content.get("command"), content.get("value")
    panel.received += 1
    text = ""
    try:
        if command in COMMANDS:
            run.give(command, _number(value) if COMMANDS[command].read == "value" else None)
    except NbdistError as error:
        text = str(error)
    if text or panel.reply["text"]:
        panel.reply = {"number": panel.received, "text": text}


def _number(text: Any) -> float:
    try:
        return float(str(text).replace(",", "."))
    except ValueError:
        raise PlanError(f"a learning rate of {text!r} is not possible: use a positive number.") from None
