"""The how-to pages: their cells run in order, in a shell of their own, and what they link to is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from shells import running_shell

FOLDER = Path(__file__).parent.parent / "notebooks" / "how_to"
PAGES = sorted(path for path in FOLDER.glob("*.md") if "```python" in path.read_text())
NEEDS = ("transformers", "peft")
_MOST_LINES = 110


def cells(page):
    """Its cells; a cell magic stands at the top of one."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_each_page_is_in_the_table_of_contents():
    """In one line; and each line leads to a page."""
    listed = re.findall(r"\]\((\w+\.md)\)", (FOLDER / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_is_short_and_its_links_lead_somewhere(page):
    """It begins with its title, and is read at one go."""
    text = page.read_text()
    assert text.startswith("# ")
    assert page.stem in ("README", "ten_programs") or text.count("\n") <= _MOST_LINES
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
             if "://" not in link]  # fmt: skip
    assert [] == [link for link in links if not (FOLDER / link.partition("#")[0]).exists()]


@pytest.mark.notebooks
@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_a_page_runs(shared_cluster, tmp_path, monkeypatch, page):
    """Each cell, without an error; it ends its engines itself."""
    for name in NEEDS:
        if re.search(rf"^(from|import) {name}", page.read_text(), re.MULTILINE) and not importlib.util.find_spec(name):
            pytest.skip(f"needs {name}: pip install 'nbdist[hf]'")
    shared_cluster.stop()
    monkeypatch.chdir(tmp_path)
    with running_shell(tmp_path) as shell:
        for cell in cells(page):
            shell.run_cell(cell, store_history=True).raise_error()
