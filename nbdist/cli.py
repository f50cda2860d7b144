"""The way in without a notebook: ``nbdist demo``, ``nbdist version``, ``nbdist doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbdist
from nbdist.errors import NbdistError, PlanError, suggest
from nbdist.plan import available_cores
from nbdist.plan.options import OptionParser, add_plan_options, plan_options
from nbdist.plan.plan import OPTIONS

__all__ = ["main"]

_PACKAGES = (
    "torch",
    "numpy",
    "ipyparallel",
    "ipykernel",
    "ipython",
    "anywidget",
    "ipywidgets",
    "cloudpickle",
    "psutil",
)
_DEMO = Path("notebooks") / "00_quickstart.ipynb"


def main(words: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 well, 1 something is wrong, 2 the command line is."""
    commands: dict[str, Callable[[list[str]], int]] = {"demo": _demo, "version": _version, "doctor": _doctor}
    words = sys.argv[1:] if words is None else words
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_USAGE)
            return 0
        if words[0] not in commands:
            raise PlanError(f"unknown command {words[0]!r}: use {', '.join(commands)}.{suggest(words[0], commands)}")
        return commands[words[0]](words[1:])
    except NbdistError as error:
        print(f"nbdist: {error}", file=sys.stderr)
        return 2 if isinstance(error, PlanError) else 1


_USAGE = """usage: nbdist demo [-n N] [NOTEBOOK]    train on real data from a notebook, here and now
       nbdist doctor [-n N] [OPTIONS]   check that engines start, meet and train on this machine
       nbdist version                   say which version this is"""


def _version(words: list[str]) -> int:
    OptionParser("nbdist version", "Say which version this is.").parse(words)
    print(f"nbdist {nbdist.__version__}")
    return 0


def _doctor(words: list[str]) -> int:
    parser = OptionParser("nbdist doctor", "Check that engines start, meet and train on this machine.")
    parser.add_argument("-n", type=int, metavar="N", help="Engines.")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="What ranks compute on.")
    add_plan_options(parser, [name for name in OPTIONS if name not in ("loss", "metric")])
    arguments = parser.parse(words)
    print(f"nbdist {nbdist.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in _PACKAGES:
        print(f"  {package:<12} {importlib.metadata.version(package)}")
    import torch

    from nbdist.cluster import Cluster

    print(f"  {available_cores()} cores, {torch.cuda.device_count()} GPUs")
    with Cluster(arguments.n, device=arguments.device) as cluster:
        print(f"{cluster.size} engines started and met in a collective in {cluster.start_seconds:.1f} s: {cluster!r}")
        layer, data = torch.nn.Linear(4, 1), (torch.randn(256, 4), torch.randn(256, 1))
        run = cluster.train(layer, data, loss="mse", **plan_options(arguments))
        print(f"a training of {run.history[-1]['steps']} steps {run.state}: all is well")
    return 0


def _demo(words: list[str]) -> int:
    parser = OptionParser("nbdist demo", "Run a notebook and print what came out.")
    parser.add_argument("notebook", nargs="?", type=Path, default=_DEMO)
    parser.add_argument("-n", type=int, metavar="N", help="Engines.")
    arguments = parser.parse(words)
    if not arguments.notebook.is_file():
        raise PlanError(f"there is no {arguments.notebook} here: run it in a checkout, or name a notebook.")
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        raise PlanError(f"the demo needs {error.name}: pip install 'nbdist[test]'.") from None
    notebook: Any = nbformat.read(arguments.notebook, as_version=4)  # type: ignore[no-untyped-call]
    if arguments.n is not None:
        os.environ["NBDIST_DEMO_ENGINES"] = str(arguments.n)
    started_s = time.monotonic()
    progress = _Progress(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(arguments.notebook.parent)}},
        on_cell_start=progress.start, on_cell_executed=progress.end,
    )  # fmt: skip
    failed: BaseException | None = None
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        failed = error
    folder = Path(tempfile.mkdtemp(prefix="nbdist-demo-"))
    executed = folder / arguments.notebook.name
    nbformat.write(notebook, executed)  # type: ignore[no-untyped-call]
    if failed is not None:
        print(f"nbdist: the notebook failed; it stands in {executed}\n{failed}", file=sys.stderr)
        return 1
    print(f"\n{_summary(notebook)}\n\n{time.monotonic() - started_s:.0f} s in all; the executed notebook: {executed}")
    return 0


class _Progress:
    """Says which cell runs, and shows what a training printed."""

    def __init__(self, notebook: Any) -> None:
        self._code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        self._started_s = 0.0

    def start(self, cell: Any, cell_index: int, **_: Any) -> None:
        if cell_index not in self._code:
            return
        self._started_s = time.monotonic()
        lines = [line for line in cell.source.splitlines() if line.strip()]
        magic = next((line for line in lines if line.lstrip().startswith("%")), lines[0] if lines else "")
        number = f"{self._code.index(cell_index) + 1}/{len(self._code)}"
        print(f"[{number}] {magic[:90]}", flush=True)

    def end(self, cell: Any, cell_index: int, execute_reply: Any, **_: Any) -> None:
        if cell_index not in self._code:
            return
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            for line in str(text).splitlines():
                print(f"      {line}", flush=True)


def _summary(notebook: Any) -> str:
    """The output of the cell tagged "summary"."""
    tagged = [cell for cell in notebook.cells if "summary" in cell.metadata.get("tags", [])]
    return "".join(output.get("text", "") for cell in tagged for output in cell.outputs).rstrip()
