"""The documents are correct: links and files that they name exist, and the README's code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from shells import running_shell

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def is_script(block):
    """Whether a block is a script of its own: it imports nbdist and is no cell of the notebook."""
    return "import nbdist" in block and not re.search("^%", block, re.MULTILINE)


SCRIPTS = [block for block in BLOCKS if is_script(block)]
CELLS = [block for block in BLOCKS if not is_script(block)]


def test_there_is_something_to_check():
    """The blocks are found: a notebook, a script with a cluster, and one for torchrun."""
    assert any("%dist_train" in cell for cell in CELLS)
    assert any("%%dist_train" in cell for cell in CELLS)
    assert any("nbdist.Cluster(" in script for script in SCRIPTS)
    assert any("nbdist.train(" in script for script in SCRIPTS)


@pytest.mark.parametrize("document", ["README.md", "nbdist/README.md", ".github/CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    """Every relative one, from where its document lies, and every file that the README names with a folder."""
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link and not link.startswith("#")]
    folder = (ROOT / document).parent
    missing = [link for link in links if not (folder / link.partition("#")[0]).exists()]
    if document == "README.md":
        assert links
        named = re.findall(r"(?:notebooks|nbdist|binder|tests)/[\w./]*\w", re.sub(r"https?://\S+", "", text))
        missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", ["nbdist/README.md", "nbdist/DECISIONS.md", "tests/README.md", "CHANGELOG.md"])
def test_files_that_are_named_exist(document):
    """By a path from the root, from the package, or by the end of one."""
    files = [
        f"/{path.relative_to(ROOT)}" for top in ("nbdist", "tests", "notebooks") for path in (ROOT / top).rglob("*")
    ]
    named = set(re.findall(r"`([\w./]+\.(?:py|js|css|ipynb|md))`", (ROOT / document).read_text()))
    assert [] == sorted(name for name in named if not any(file.endswith(f"/{name}") for file in files))


def test_the_notebook_runs(cluster, tmp_path, monkeypatch):
    """Its cells in order, in one shell, with the packages of `pip install .` alone, end as the text says."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with running_shell(tmp_path) as shell:
        for cell in CELLS:
            # In a notebook a block without a cell magic is one cell as it stands; a cell magic stands at its top.
            for part in re.split(r"\n(?=%%)", cell):
                shell.run_cell(part, store_history=True).raise_error()


@pytest.mark.programs
@pytest.mark.parametrize("script", SCRIPTS, ids=[f"script{i}" for i in range(len(SCRIPTS))])
def test_scripts_run(shared_cluster, tmp_path, script):
    """With plain Python, and those that call nbdist.train under torchrun too."""
    shared_cluster.stop()
    (tmp_path / "train.py").write_text(script)
    commands = [[sys.executable, "train.py"]]
    if "nbdist.train(" in script:
        commands.append([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                         "train.py"])  # fmt: skip
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), "a script tells what came out"
