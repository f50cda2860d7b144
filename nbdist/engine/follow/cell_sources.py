"""Cell sources on the engines, for tracebacks; and the notebook's classes there."""

from __future__ import annotations

import linecache
import os
from collections.abc import Collection, Mapping
from typing import Any

from nbdist.upstream.ipython_private import cell_number, class_mark, set_class_mark

__all__ = ["add_cells", "class_marks", "label_of", "labelled", "new_cells", "tie_classes"]

_labels: dict[str, str] = {}


def new_cells(known: Collection[str]) -> dict[str, tuple[str, str]]:
    """The cells that have run in this notebook: file name -> (label such as ``Cell In[5]``, source).

    Args:
        known: File names that are left out.
    """
    return {
        name: (_cell_label(name), "".join(entry[2]))
        for name, entry in list(linecache.cache.items())
        # Entries without a modification time are no files but cells, put there by IPython or by nbdist.
        if len(entry) == 4 and entry[1] is None and name not in known
    }


def _cell_label(name: str) -> str:
    """IPython's own label for the file name that it gave a cell, such as ``Cell In[5]``."""
    number = cell_number(name)
    return name if number is None else f"Cell In[{number}]"


def add_cells(cells: Mapping[str, tuple[str, str]]) -> None:
    """Add cells, as `new_cells` has them, to this process's linecache."""
    for name, (label, source) in cells.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        _labels[name] = label


def labelled(text: str) -> str:
    """Replace the files of cells in a text by their labels. Runs on an engine."""
    for name, label in _labels.items():
        text = text.replace(os.path.basename(name), label)
    return text


def label_of(file_name: str) -> str | None:
    """The label of a cell of the notebook or of this process, by its file name; None for other files."""
    if file_name in _labels:
        return _labels[file_name]
    own = _cell_label(file_name)
    return None if own == file_name else own


def class_marks(namespace: dict[str, Any]) -> dict[str, str]:
    """The marks of the classes that a notebook defined, by name; see `class_mark`."""
    return {name: class_mark(value) for name, value in _classes(namespace).items() if not name.startswith("_")}


def tie_classes(marks: dict[str, str], namespace: dict[str, Any]) -> None:
    """Give the classes of `namespace` the notebook's marks, after both have run the same definition.

    Runs on an engine. Without it, an instance pulled from here would be of a copy of the notebook's class.
    """
    for name, kind in _classes(namespace).items():
        if name in marks:
            set_class_mark(kind, marks[name])


def _classes(namespace: dict[str, Any]) -> dict[str, type]:
    """The classes that the cells of a namespace defined."""
    return {n: v for n, v in list(namespace.items()) if isinstance(v, type) and v.__module__ == "__main__"}
