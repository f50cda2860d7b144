"""The notebook's cell sources, search path and classes on the engines."""

from __future__ import annotations

import linecache

import cloudpickle
import pytest

from nbdist.engine.cell_sources import (
    CellSources,
    NotebookUpdate,
    class_marks,
    install,
    label_of,
    search_path,
    tie_classes,
)


@pytest.fixture
def cell():
    """A cell that IPython has run, as linecache knows it."""
    name, source = "/tmp/ipykernel_1/123.py", "def f():\n    return 1\n"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    yield name, source
    linecache.cache.pop(name)


def test_each_cell_is_sent_once(cell):
    """With its source; files that were read from disk are not cells."""
    name, source = cell
    linecache.getline(__file__, 1)
    sources = CellSources()
    fresh = sources.new([1, 2]).sources
    assert fresh[name] == (name, source)
    assert __file__ not in fresh
    assert sources.new([1, 2]).sources == {}


def test_all_cells_are_sent_again_once_an_engine_is_new(cell):
    """One that replaces another, or joins; not when one leaves."""
    name, _ = cell
    sources = CellSources()
    processes = [1, 2], [1], [1, 3], [3, 1], [3, 1, 4]
    sent = [name in sources.new(alive).sources for alive in processes]
    assert [True, False, True, False, True] == sent


def test_an_installed_cell_has_lines_and_a_label():
    """Tracebacks of that process can then show it; other files have no label."""
    install(NotebookUpdate(sources={"<far>": ("Cell In[9]", "a = 1\nb = 2\n")}, path=[]))
    assert linecache.getline("<far>", 2) == "b = 2\n"
    assert label_of("<far>") == "Cell In[9]"
    assert label_of(__file__) is None
    linecache.cache.pop("<far>")


def test_modules_are_found_where_the_notebook_finds_them(monkeypatch):
    """Additions to the notebook's ``sys.path`` are appended here, once."""
    monkeypatch.setattr("sys.path", ["", "/own"])
    for _ in range(2):
        install(NotebookUpdate(sources={}, path=["/own", "/added"]))
    assert [*search_path()[:2], "/added"] == search_path()


def define():
    namespace = {"__name__": "__main__"}
    exec("class Net:\n    pass\n\nclass _Hidden:\n    pass\n\nx = 1", namespace)
    return namespace


def test_copies_of_a_class_become_one():
    """After both sides have run the same definition, an instance from there is of the class here."""
    here, there = define(), define()
    marks = class_marks(here)
    assert list(marks) == ["Net"]
    tie_classes(marks, there)
    tie_classes(marks, here)  # in one process both sides share cloudpickle's table; in the end ours is in it
    assert type(cloudpickle.loads(cloudpickle.dumps(there["Net"]()))) is here["Net"]
