"""``%dist_export``: the newest run as a script, from the cells that have run, and what it begins with."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell

from nbdist.cluster import Run, current_cluster
from nbdist.errors import PlanError
from nbdist.notebook.cell_slice import Statement, statements_of
from nbdist.notebook.script import Script, TrainCall, script_of

__all__ = ["export"]


def export(shell: InteractiveShell, run: Run, call: TrainCall, file: str) -> str:
    """Write a run as a script; returns a sentence on what was written.

    Args:
        shell: Its history has the cells.
        run: Not followed by another one.
        call: How it was written.
        file: The script's path.

    Raises:
        PlanError: The cells do not make again what the run has trained.
    """
    from nbdist.cluster.runs.start_state import parts_to_keep, save_start  # loads torch

    path = Path(file).expanduser()
    if path.suffix != ".py":
        raise PlanError(f"{file} is to be a script: give it a name that ends with .py.")
    control, plan = run.control, run.plan
    if not control.arguments:
        raise PlanError(f"{run.run_id} was not started by this kernel, or another run came after it: train again here.")
    if run.state not in ("finished", "stopped") and run.ended:
        raise PlanError(f"{run.run_id} has {run.state}: a script of it would fail as well.")
    cluster = current_cluster()
    device = "auto" if cluster is None else cluster.device
    statements, failed = _history(shell, call.cell), PlanError("")
    found: tuple[Script, frozenset[str]] | None = None
    for careful in (False, True):  # what may only show is left out, unless something is missing then
        try:
            script = script_of(call, statements, threads=plan.threads, device=device, careful=careful)
            kept = parts_to_keep(control, script.beginning, script.arguments)
        except PlanError as error:
            failed = error
            continue
        if found is None or len(kept) < len(found[1]):
            found = script, kept
        if not kept:
            break
    if found is None:
        raise failed
    script, kept = found
    model = control.arguments["model"]
    form = "mapping" if isinstance(model, Mapping) else "sequence" if isinstance(model, (list, tuple)) else "module"
    about = f"{call.model} trained on {call.data}: run {run.run_id} of a notebook, written by nbdist."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script.text(about, plan.mesh.size, path.name, form=form, kept=kept))
    beside = path.with_suffix(".start.pt")
    if kept:
        save_start(beside, control, kept)
    names = {"weights": "the weights", "data": "the data", "val": "the validation data"}
    which = " and ".join(names[part] for part in ("weights", "data", "val") if part in kept)
    also = f"; {beside.name} has {which} at the start, which the cells do not make again" if kept else ""
    return f"wrote {path}, for torchrun --nproc-per-node {plan.mesh.size} {path.name}{also}"


def _history(shell: InteractiveShell, cell: int) -> list[Statement]:
    """The statements of all cells up to a run, those before it in its own cell included."""
    sources: Sequence[str] = shell.history_manager.input_hist_parsed if shell.history_manager is not None else ()
    found: list[Statement] = []
    for number, source in enumerate(sources[: cell + 1]):
        found += statements_of(_before_run(source) if number == cell else source, number)
    return found


def _before_run(source: str) -> str:
    """What comes before the first magic that trains."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return ""
    lines = source.splitlines()
    for node in body:
        if "'dist_train'" in ast.unparse(node):
            return "\n".join(lines[: node.lineno - 1])
    return source
