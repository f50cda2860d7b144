"""What changes in the notebook reaches each engine once, in turn; here both are this process."""

from __future__ import annotations

import importlib
import linecache
import os
import sys

import pytest
import torch

from nbdist.engine.follow import install as installing
from nbdist.engine.follow.changes import NotebookChanges, NotebookUpdate, SearchPath
from nbdist.engine.follow.install import install


@pytest.fixture(autouse=True)
def engine(monkeypatch, tmp_path):
    """An engine that has nothing of any notebook; folder and search path are restored."""
    monkeypatch.setattr(installing, "_Installed", type("_Installed", (), {"of": "", "count": 0, "path": ()}))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cell():
    """A cell that IPython has run, as linecache knows it."""
    name, source = "/tmp/ipykernel_1/123.py", "def f():\n    return 1\n"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    yield name, source
    linecache.cache.pop(name)


def sent(changes, processes, count=None):
    """The changes of an update."""
    return list(changes.update(processes, count).changes)


def test_each_cell_is_sent_once(cell):
    """With its source; files that were read from disk are not cells."""
    name, source = cell
    linecache.getline(__file__, 1)
    changes = NotebookChanges()
    changes.look()
    cells = {key: value for change in sent(changes, [1, 2]) for key, value in change.cells.items()}
    assert (name, source) == cells[name]
    assert __file__ not in cells
    assert [] == sent(changes, [1, 2])


def test_nothing_is_noted_where_nothing_changes():
    """A second look costs no change."""
    changes = NotebookChanges()
    assert changes.look() == changes.look()


def test_engines_elsewhere_get_the_modules_that_are_imported_already(monkeypatch, tmp_path):
    """With the text that they run; on this host engines read the files."""
    (tmp_path / "imported_before.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("imported_before")
    (tmp_path / "imported_before.py").write_text("x = 2\n")
    for everything in (False, True):
        changes = NotebookChanges(everything=everything)
        texts = {one.name: one.text for change in sent(changes, [1]) for one in change.modules}
        assert texts.get("imported_before") == (b"x = 1\n" if everything else None)
    sys.modules.pop("imported_before")


def test_an_engine_that_is_new_gets_all(monkeypatch):
    """One that replaces another, or joins; not when one leaves."""
    changes, numbers = NotebookChanges(), []
    for number, processes in enumerate([[1, 2], [1], [1, 3], [3, 1], [3, 1, 4]]):
        monkeypatch.setenv("FOLLOWED", str(number))
        changes.look()
        numbers.append(changes.update(processes).first)
    assert [0, 2, 0, 4, 0] == numbers


def test_variables_folder_and_settings_follow(monkeypatch, tmp_path):
    """Set, changed and removed; those of rendezvous, devices and threads do not."""
    changes = NotebookChanges()
    monkeypatch.setenv("FOLLOWED", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (tmp_path / "data").mkdir()
    os.chdir(tmp_path / "data")
    torch.set_default_dtype(torch.float64)
    changes.look()
    update = changes.update([1])
    assert {"FOLLOWED": "1"} == update.changes[-1].variables
    for name in ("FOLLOWED", "MASTER_PORT"):
        monkeypatch.delenv(name)
    os.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    try:
        assert [] == install(update)
        assert ("1", str(tmp_path / "data"), torch.float64) == (
            os.environ["FOLLOWED"], os.getcwd(), torch.get_default_dtype(),
        )  # fmt: skip
        assert "MASTER_PORT" not in os.environ
    finally:
        torch.set_default_dtype(torch.float32)
    os.environ.pop("FOLLOWED")
    changes.look()
    os.environ["FOLLOWED"] = "2"
    install(changes.update([1]))
    assert "FOLLOWED" not in os.environ


def test_what_a_cell_changed_on_an_engine_stays(monkeypatch, tmp_path):
    """Until the notebook changes the same."""
    changes = NotebookChanges()
    monkeypatch.setenv("FOLLOWED", "notebook")
    changes.look()
    install(changes.update([1]))
    os.environ["FOLLOWED"] = "cell"
    (update, again) = (changes.update([1]), changes.update([1, 2]))
    assert () == update.changes
    install(again)  # another engine is new, so all are sent
    assert "cell" == os.environ["FOLLOWED"]


def test_an_engine_that_starts_later_sees_the_notebook_as_it_was_at_each_cell(monkeypatch):
    """Then as it is: with the variables that it inherited being newer."""
    monkeypatch.setenv("FOLLOWED", "first")
    changes = NotebookChanges()
    before = changes.look()
    monkeypatch.setenv("FOLLOWED", "second")
    changes.look()
    seen = []
    for count in (changes.count, before, changes.count):
        install(changes.update([1], count))
        seen.append(os.environ["FOLLOWED"])
        if len(seen) == 1:  # a run came first, and now come cells that ran before it
            changes.rewind([1])
    assert ["second", "first", "second"] == seen


def test_what_an_interrupted_engine_may_not_have_is_sent_again(monkeypatch):
    """And applied once."""
    changes = NotebookChanges()
    monkeypatch.setenv("FOLLOWED", "1")
    changes.look()
    changes.update([1])  # and it never arrives
    changes.forget([1])
    os.environ["FOLLOWED"] = "0"
    install(changes.update([1]))
    assert "1" == os.environ["FOLLOWED"]


def test_variables_are_in_no_text(monkeypatch):
    """Neither of an update nor of a change: errors and logs print them."""
    changes = NotebookChanges()
    monkeypatch.setenv("FOLLOWED_TOKEN", "secret")
    changes.look()
    assert "secret" not in repr(changes.update([1]))


def test_a_deleted_folder_changes_nothing(tmp_path):
    """Neither in the notebook, whose folder is then unknown, nor where an engine cannot enter it: a note says so."""
    changes, gone = NotebookChanges(), tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    changes.look()
    update = changes.update([1])
    os.chdir(tmp_path)
    gone.rmdir()
    (note,) = install(update)
    assert f"the notebook's folder {gone} cannot be entered here (No such file or directory)" == note
    assert str(tmp_path) == os.getcwd()
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    changes.look()
    install(changes.update([1]))
    os.chdir(tmp_path)


def test_modules_are_found_where_the_notebook_finds_them(monkeypatch):
    """In its order: what is inserted before others shadows them here too, and what is removed is gone."""
    monkeypatch.setattr("sys.path", ["", "/own"])
    changes = NotebookChanges()
    monkeypatch.setattr("sys.path", ["/before", "", "/own", "/added"])
    changes.look()
    both = changes.update([1])
    monkeypatch.setattr("sys.path", ["", "/own", "/engines"])
    install(both)
    assert ["/before", "", os.getcwd(), "/own", "/added", "/engines"] == sys.path
    monkeypatch.setattr("sys.path", ["", "/own", "/added"])
    changes.look()
    fewer = changes.update([1])
    monkeypatch.setattr("sys.path", ["/before", "", os.getcwd(), "/own", "/added", "/engines"])
    install(fewer)
    assert ["", os.getcwd(), "/own", "/added", "/engines"] == sys.path


def test_the_folders_of_another_python_come_last(monkeypatch):
    """Its packages may not fit to this one."""
    monkeypatch.setattr("sys.path", ["/own"])
    other = installing.Change(path=SearchPath(entries=("/theirs", "/own"), python=("/other", (3, 9))))
    install(NotebookUpdate(of="other", first=0, changes=(other,)))
    assert ["/own", "/theirs"] == sys.path
