"""``nbdist demo``: run a notebook from a terminal, print its trainings live, and its summary at the end."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from nbdist.errors import PlanError
from nbdist.telemetry.record import records
from nbdist.telemetry.run_view import epoch_text

__all__ = ["run_demo"]

_POLL_S = 0.1
_ALREADY_SHOWN = "nbdist: "


def run_demo(path: Path, engines: int | None = None) -> int:
    """Execute a notebook and print the output of its cell tagged "summary" at the end.

    Args:
        path: The notebook; the executed copy is written to a new temporary folder.
        engines: Passed to the notebook as ``$NBDIST_DEMO_ENGINES``.

    Returns:
        The exit status.

    Raises:
        PlanError: There is no such notebook, or nbclient is not installed.
    """
    if not path.is_file():
        raise PlanError(f"there is no {path} here: run it in a checkout, or name a notebook.")
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        raise PlanError(f"the demo needs {error.name}: pip install 'nbdist[test]'.") from None
    notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    folder = Path(tempfile.mkdtemp(prefix="nbdist-demo-"))
    os.environ["NBDIST_HOME"] = str(folder)
    # Threads that spin while they wait make a comparison on a busy machine meaningless.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if engines is not None:
        os.environ["NBDIST_DEMO_ENGINES"] = str(engines)
    epochs = _Epochs()
    cells = _Cells(notebook, epochs)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=cells.start,
        on_cell_executed=cells.end,
    )
    started_s = time.monotonic()
    status = 0
    with epochs:
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            print(f"nbdist: the notebook failed:\n{error}", file=sys.stderr)
            status = 1
    executed = folder / path.name
    nbformat.write(notebook, executed)  # type: ignore[no-untyped-call]
    print(f"\n{cells.summary}\n\n{time.monotonic() - started_s:.0f} s in all; the executed notebook: {executed}")
    return status


class _Cells:
    """Prints the running cell's first line, and its output when it is done."""

    def __init__(self, notebook: Any, epochs: _Epochs) -> None:
        self._epochs = epochs
        self._code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        self.summary = ""

    def start(self, cell: Any, cell_index: int, **_: Any) -> None:
        if cell_index in self._code:
            lines = [line for line in cell.source.splitlines() if line.strip()]
            first = next((line for line in lines if line.startswith("%")), lines[0] if lines else "")
            print(f"[{self._code.index(cell_index) + 1}/{len(self._code)}] {first[:100]}", flush=True)

    def end(self, cell: Any, cell_index: int, **_: Any) -> None:
        self._epochs.show_new()
        outputs = cell.get("outputs", [])
        text = "".join(str(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in outputs)
        if "summary" in cell.metadata.get("tags", []):
            self.summary = text.rstrip()
            return
        for line in text.splitlines():
            if not line.startswith(_ALREADY_SHOWN):
                print(f"      {line}", flush=True)


class _Epochs:
    """Prints each epoch of each run when it ends, from the records that rank 0 writes. A context manager."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="nbdist-demo")

    def __enter__(self) -> _Epochs:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def show_new(self) -> None:
        """Print the new epochs."""
        with self._lock:
            for path in sorted(records().glob("*/rank0.jsonl")):
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[self._read.get(path, 0) :]:
                    if not line.endswith("\n"):
                        break  # still being written
                    self._read[path] = self._read.get(path, 0) + 1
                    event = json.loads(line)
                    if event["event"] == "EpochFinished":
                        print(f"      {epoch_text(event['row'])}", flush=True)

    def _follow(self) -> None:
        while not self._done.wait(_POLL_S):
            self.show_new()
