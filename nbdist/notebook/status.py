"""The status of engines, the newest run and the fork server, for ``%dist_status``: a table that updates itself."""

from __future__ import annotations

import contextvars
import threading
import time
from html import escape

import psutil
from IPython.display import display

from nbdist.cluster import Cluster, Run, current_cluster, current_server, last_run
from nbdist.errors import ranks_text
from nbdist.telemetry.run_view import html_table, summary, text_table
from nbdist.telemetry.units import number

__all__ = ["describe_cluster", "engines_text", "show_status"]

_COLUMNS = ("rank", "pid", "host", "device", "state", "memory", "works on")
_EVERY_S = 1.0


def show_status(*, live: bool) -> None:
    """Display the status.

    Args:
        live: Whether to update the display once a second, until the engines are idle.
    """
    if not live:
        print("\n".join(_text()))
        return
    shown = display(_bundle(), raw=True, display_id=True)
    run = last_run()
    if run is not None and not run.ended:
        follow = threading.Thread(
            target=contextvars.copy_context().run, args=(_follow, shown.display_id), daemon=True, name="nbdist-status"
        )
        _Newest.thread = follow
        follow.start()


class _Newest:
    """The thread that updates the display; an earlier one ends."""

    thread: threading.Thread | None = None


def _follow(display_id: str) -> None:
    going = True
    while going and _Newest.thread is threading.current_thread():
        time.sleep(_EVERY_S)
        run, cluster = last_run(), current_cluster()
        going = cluster is not None and ((run is not None and not run.ended) or bool(cluster.queued))
        display(_bundle(), raw=True, display_id=display_id, update=True)


def _text() -> list[str]:
    rows = _rows()
    return [*(text_table(_COLUMNS, rows) if rows else []), *_lines()]


def _bundle() -> dict[str, str]:
    rows = _rows()
    html = "".join([html_table(_COLUMNS, rows) if rows else "", *(f"<p>{escape(line)}</p>" for line in _lines())])
    text = "\n".join(f"nbdist: {line}" for line in _text())
    return {"text/plain": text, "text/html": f'<div class="nbdist">{html}</div>'}


def _rows() -> list[tuple[str, ...]]:
    cluster = current_cluster()
    if cluster is None:
        return []
    run = cluster.current_run
    rows: list[tuple[str, ...]] = []
    standings = {} if run is None else run.progress.standings
    for engine in cluster.engines:
        lost = engine.state == "lost"
        works = _work(run, engine.rank, standings) if engine.state == "busy" and run is not None else "–"
        memory = "–" if lost else _memory(cluster.memory(engine))
        rows.append((str(engine.rank), str(engine.pid), engine.host, engine.device, engine.state, memory, works))
    rows += [
        ("spare", str(e.pid), e.host, "–", e.state, _memory(cluster.memory(e)), "–") for e in cluster.spare_engines
    ]
    return rows


def _work(run: Run, rank: int, standings: dict[int, str]) -> str:
    state = run.progress.ranks.get(rank)
    if state is None:
        return "–"
    return f"step {state.step:,}, {number(state.samples_per_s)} samples/s, {standings[rank]}"


def _lines() -> list[str]:
    cluster, run, server = current_cluster(), last_run(), current_server()
    lines = ["no engines are running: %dist_start starts them"] if cluster is None else []
    if run is not None:
        lines.append(f"newest run {run.run_id}: {summary(run.progress)}")
    if cluster is not None and cluster.queued:
        lines.append(f"queued: {', '.join(queued.run_id for queued in cluster.queued)}")
    if server is not None:
        memory = _memory(psutil.Process(server.pid).memory_info().rss)
        lines.append(f"fork server for a quick start: pid {server.pid}, {memory} (%dist_stop --all ends it)")
    return lines


def _memory(nbytes: int) -> str:
    return f"{number(nbytes / 2**20)} MiB" if nbytes else "–"


def describe_cluster(cluster: Cluster) -> str:
    """The engines of a cluster in one line."""
    engines = cluster.engines
    devices = ", ".join(sorted({engine.device for engine in engines}))
    hosts = ", ".join(sorted({engine.host for engine in engines}))
    threads = cluster.threads
    each = f"{threads} thread{'s' if threads > 1 else ''} each"
    who = f"{engines_text(cluster.size)} ({ranks_text(range(cluster.size))})"
    return f"{who} on {hosts}: {devices} over {cluster.transport}, {each}"


def engines_text(count: int) -> str:
    """How many engines, in words."""
    return f"{count} engine{'s' if count != 1 else ''}"
