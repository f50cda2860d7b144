"""The tutorial notebooks: committed executed and clean, and they run."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from shared_cluster import HUNG_S

import nbdist

SANITIZE = Path(nbdist.__file__).parent / "notebook" / "nbval_sanitize.cfg"
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
_MOST_BYTES = 500_000
_EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_OUR_PATHS = re.compile(r"/(home|Users|root|work|tmp|usr|opt|mnt)/\w")


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


# --------------------------------------------------------------------------------------------- as they are committed


def test_there_are_ten():
    """The order of their names is the order to read them in."""
    assert [path.stem for path in NOTEBOOKS] == [
        "00_quickstart", "01_engines_and_ranks", "02_data_parallel", "03_pipeline", "04_tensor_and_shard", "05_hybrid",
        "06_failures", "07_panel", "08_your_own_step", "09_reinforcement",
    ]  # fmt: skip


def test_small():
    """All of them together are a quick download."""
    assert sum(path.stat().st_size for path in NOTEBOOKS) < _MOST_BYTES


@_EACH
def test_committed_in_order_executed(path):
    """Every code cell was run, once, from top to bottom."""
    cells = code_cells(path)
    assert list(range(1, len(cells) + 1)) == [cell.execution_count for cell in cells]


@_EACH
def test_only_announced_errors(path):
    """A cell shows an error exactly if it is tagged so, and then with its source line."""
    for cell in code_cells(path):
        errors = [output for output in cell.outputs if output.output_type == "error"]
        assert bool(errors) == ("raises-exception" in tags(cell))
        for error in errors:
            text = _COLOUR.sub("", "\n".join(error.traceback))
            reported = re.search(r"^EngineError: ranks? [\d-]+: (\w+): ", text, re.MULTILINE)
            assert reported
            # a sentence of ours names the line itself
            line = r"Cell In\[\d+\], line \d+" if reported[1] in ("TaskError", "PlanError") else r"^-+> *\d+ "
            assert re.search(line, text, re.MULTILINE)


@_EACH
def test_readable_without_a_kernel(path):
    """Outputs are text and static HTML: no widgets, no warnings, and no tags that GitHub removes."""
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.get("name") != "stderr", output
            data = output.get("data", {})
            assert set(data) <= {"text/plain", "text/html"}
            assert not data or "text/plain" in data
            assert not re.search(r"<(script|style|progress|iframe)", data.get("text/html", ""))


@_EACH
def test_nothing_of_the_machine_that_ran_it(path):
    """No widget state, no timestamps, no paths, and the standard kernel."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
    assert not _OUR_PATHS.search(path.read_text())


@_EACH
def test_frame(path):
    """Each begins with its learning goals, and stops its engines."""
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source
    assert first.startswith("# ")
    assert "**You will learn**" in first
    sources = [cell.source for cell in code_cells(path)]
    last = next(line for source in reversed(sources) for line in reversed(source.splitlines()) if "%dist_" in line)
    assert last == "%dist_stop"


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=[path.stem for path in NOTEBOOKS[1:]])
def test_exercise(path):
    """Those that explain end with an exercise and its solution."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    assert "## Exercise" in text
    assert "<details><summary>Solution</summary>" in text


def test_quickstart_ends_with_its_summary():
    """The last code cell is tagged, leaves its numbers in `summary` and prints a table of them."""
    last = code_cells(NOTEBOOKS[0])[-1]
    assert tags(last) == ["summary", "nbval-ignore-output"]  # seconds and a speed-up
    assert last.source.startswith("summary = {")
    (output,) = last.outputs
    assert last_row(output.text)["engines"] >= 2
    assert last_row(output.text)["accuracy"] > 0.95


def last_row(table: str) -> dict[str, float]:
    """What the quickstart's table says of the engines."""
    engines, word, threads, seconds, accuracy, speed_up = table.splitlines()[-1].split()
    assert word == "engines"
    return {
        "engines": int(engines),
        "threads": int(threads),
        "seconds": float(seconds),
        "accuracy": float(accuracy),
        "speed_up": float(speed_up),
    }


# -------------------------------------------------------------------------------------------------------- as they run


def cluster_processes(home: Path) -> list[psutil.Process]:
    """Processes of a cluster that this test started, directly or not: they inherit its home."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "nbdist.cluster" in " ".join(process.cmdline()) and process.environ().get("NBDIST_HOME") == str(home):
                found.append(process)
    return found


def assert_nothing_runs(home: Path) -> None:
    _, left = psutil.wait_procs(cluster_processes(home), timeout=HUNG_S)
    assert not left


@pytest.fixture
def patient_threads(monkeypatch):
    """Threads of the kernel sleep while they wait: on a busy machine, spinning ones make it many times slower."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def nbval(report: Path, *options: str) -> int:
    """Run pytest as a user would; returns how many cells passed."""
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *options, f"--junit-xml={report}"]
    done = subprocess.run([*command, f"--nbval-cell-timeout={HUNG_S:g}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return len(ElementTree.parse(report).findall(".//testcase"))


@pytest.mark.notebooks
@pytest.mark.usefixtures("patient_threads")
@_EACH
def test_strictly_every_output_comes_out_again(path, home, tmp_path):
    """Under strict nbval, with the file that nbdist ships; and no process stays."""
    cells = nbval(tmp_path / "report.xml", "--nbval", f"--nbval-sanitize-with={SANITIZE}", str(path))
    assert len(code_cells(path)) == cells
    assert_nothing_runs(home)


@pytest.mark.notebooks
@pytest.mark.usefixtures("patient_threads")
def test_laxly_all_of_them_pass(home, tmp_path):
    """With --nbval-lax alone: every cell runs, and checked outputs are reproduced."""
    cells = nbval(tmp_path / "report.xml", "--nbval-lax", str(NOTEBOOKS[0].parent))
    assert sum(len(code_cells(path)) for path in NOTEBOOKS) == cells
    assert_nothing_runs(home)


@pytest.mark.notebooks
@pytest.mark.usefixtures("patient_threads")
def test_quickstart_with_four_engines(home, tmp_path, monkeypatch):
    """$NBDIST_DEMO_ENGINES chooses how many, and four train as well as two."""
    monkeypatch.setenv("NBDIST_DEMO_ENGINES", "4")
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    NotebookClient(notebook, timeout=HUNG_S, resources={"metadata": {"path": tmp_path}}).execute()
    *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert last_row(last.outputs[0].text)["engines"] == 4
    assert last_row(last.outputs[0].text)["accuracy"] > 0.95
    assert_nothing_runs(home)
