"""A notebook of a user's own, under strict nbval with the file that nbdist ships."""

from __future__ import annotations

import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from net import NET
from shared_cluster import HUNG_S

CELLS = [
    "%load_ext nbdist\n%dist_start -n 2 --device cpu",
    NET,
    "%dist_train model train_set --loss cross_entropy --epochs 3 --val test_set --metric accuracy",
    "run = %dist_train model train_set --loss cross_entropy --epochs 2 --background\nrun.wait()",
    "%dist_run",
    "%dist_runs -n 2",
    "%dist_status",
    "sum(parameter.numel() for parameter in model.parameters())",
    "%dist_stop --all",
]


@pytest.mark.notebooks
def test_every_output_comes_out_again(home, tmp_path):
    """Panels, tables and values; and a changed output is found."""
    where = subprocess.run([sys.executable, "-m", "nbdist", "nbval-sanitize"], capture_output=True, text=True).stdout
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=HUNG_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    notebook.cells[7].outputs[0].data["text/plain"] = "22"
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-sanitize-with",
        where.strip(),
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    mine, wrong = (
        subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, cwd=tmp_path)
        for name in ("mine.ipynb", "wrong.ipynb")
    )
    assert 0 == mine.returncode, mine.stdout + mine.stderr
    assert 1 == wrong.returncode
    assert "1 failed, 8 passed" in wrong.stdout
