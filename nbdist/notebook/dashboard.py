"""The dashboard: a run drawn live, in a notebook as a panel, elsewhere as lines; at the end what remains of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from IPython.display import display

from nbdist.cluster import Run
from nbdist.telemetry import run_html, run_text
from nbdist.telemetry.number import duration, number
from nbdist.telemetry.view import epoch_text, memory_text, mesh_text

__all__ = ["LineDashboard", "PanelDashboard", "make_dashboard", "remains"]

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_HERE = Path(__file__).parent


def has_front_end(shell: Any) -> bool:
    """Whether `shell` runs in a kernel, so that what it displays can change later."""
    return getattr(shell, "kernel", None) is not None


def make_dashboard(shell: Any) -> LineDashboard | PanelDashboard:
    """A panel where the shell has a notebook in front of it, else lines."""
    return PanelDashboard() if has_front_end(shell) else LineDashboard()


class LineDashboard:
    """Prints a line for each epoch, and a summary at the end."""

    def __init__(self) -> None:
        self._rows = 0

    def update(self, run: Run) -> None:
        """Called by the relay, from its thread."""
        for row in run.history[self._rows :]:
            print(f"nbdist: {epoch_text(row)}", flush=True)
            self._rows += 1
        if not run.progress.running:
            print(run_text(run.progress).splitlines()[0], flush=True)


class PanelDashboard:
    """One widget for one run, replaced at its end by static HTML and text that a saved notebook keeps."""

    def __init__(self) -> None:
        self._widget: Any = None
        self._handle: Any = None
        self._lock = threading.Lock()  # the relay's thread and, at first, the cell's

    def update(self, run: Run) -> None:
        """Called by the relay, from its thread."""
        with self._lock:
            if self._handle is None:
                self._show(run)
                return
            self._widget.view = panel_view(run)
            if not run.progress.running:
                display(remains(run), raw=True, display_id=self._handle.display_id, update=True)

    def _show(self, run: Run) -> None:
        self._widget = _make_widget(run)
        bundle = {**_live(self._widget), **remains(run)} if run.progress.running else remains(run)
        self._handle = display(bundle, raw=True, display_id=True)


def panel_view(run: Run) -> dict[str, Any]:
    """What the panel draws, as JSON-able data: texts are made here, so that the front end only places them."""
    progress = run.progress
    total = progress.steps_total
    return {
        "title": f"{progress.title} on {mesh_text(progress.plan)}",
        "state": progress.state,
        "notes": "\n".join(progress.notes),
        "error": progress.error,
        "step": f"step {progress.step:,}" + ("" if total is None else f" of {total:,}"),
        "share": None if not total else progress.step / total,
        "facts": f"loss {number(progress.loss)} · {number(progress.samples_per_s)} samples/s · "
        f"{duration(progress.elapsed_s)}",
        "epoch": epoch_text(progress.history[-1]) if progress.history else "",
        "ranks": [
            {
                "rank": rank.rank,
                "state": rank.state,
                "device": rank.device,
                "host": rank.host,
                "step": f"{rank.step:,}",
                "share": None if not total else rank.step / total,
                "loss": number(rank.loss),
                "speed": f"{number(rank.samples_per_s)} samples/s",
                "memory": memory_text(rank),
            }
            for _, rank in sorted(progress.ranks.items())
        ],
    }


def remains(run: Run) -> dict[str, str]:
    """What needs no kernel: the run as static HTML and as text, by MIME type."""
    return {"text/html": run_html(run.progress), "text/plain": run_text(run.progress)}


def _live(widget: Any) -> dict[str, Any]:
    # written out, for widgets of ipywidgets 7 cannot say it themselves
    return {_WIDGET_VIEW: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}


def _make_widget(run: Run) -> Any:
    import anywidget
    import traitlets

    class Panel(anywidget.AnyWidget):
        _esm = _HERE / "dashboard.js"
        _css = _HERE / "dashboard.css"
        view = traitlets.Dict().tag(sync=True)

    panel = Panel(view=panel_view(run))
    panel.on_msg(lambda _widget, content, _buffers: run.stop() if content.get("command") == "stop" else None)
    _answer_while_busy(panel)
    return panel


def _answer_while_busy(widget: Any) -> None:
    """Let clicks arrive while a cell is running.

    ipykernel 7.4 answers on the shell that published last, which is busy with the very cell; the front end's own
    choice of a free subshell must win. Private, so only where it exists; elsewhere the interrupt button stops a run.
    """
    comm = getattr(widget, "comm", None)
    if comm is not None and hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
