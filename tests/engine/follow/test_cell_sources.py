"""The notebook's cell sources and classes on the engines."""

from __future__ import annotations

import linecache

import cloudpickle

from nbdist.engine.follow.cell_sources import add_cells, class_marks, label_of, tie_classes


def test_an_added_cell_has_lines_and_a_label():
    """Tracebacks of that process can then show it; other files have no label."""
    add_cells({"<far>": ("Cell In[9]", "a = 1\nb = 2\n")})
    assert linecache.getline("<far>", 2) == "b = 2\n"
    assert label_of("<far>") == "Cell In[9]"
    assert label_of(__file__) is None
    linecache.cache.pop("<far>")


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
