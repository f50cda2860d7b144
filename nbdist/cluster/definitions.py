"""Definitions of the notebook on the engines: source lines for tracebacks, and one identity for one class."""

from __future__ import annotations

import linecache
import sys
from dataclasses import dataclass, field
from typing import Any

import cloudpickle.cloudpickle as cloudpickle_internals

__all__ = ["CellSources", "class_marks", "install_sources", "label_of", "tie_classes"]

_labels: dict[str, str] = {}


@dataclass
class CellSources:
    """The cells of this notebook that the engines have not been told of yet."""

    sent: set[str] = field(default_factory=set)

    def new(self) -> dict[str, tuple[str, str]]:
        """File name -> (label for people, source) of cells that were not returned before."""
        fresh = {
            name: (_cell_label(name), "".join(entry[2]))
            for name, entry in list(linecache.cache.items())
            # Entries without a modification time are not files: cells of a notebook, put there by IPython or by us.
            if len(entry) == 4 and entry[1] is None and name not in self.sent
        }
        self.sent.update(fresh)
        return fresh


def _cell_label(name: str) -> str:
    """IPython's own label for the file name that it gave a cell, such as ``Cell In[5]``."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    numbers = getattr(getattr(shell, "compile", None), "_filename_map", {})  # private: a better label, no more
    return f"Cell In[{numbers[name]}]" if name in numbers else name


def install_sources(sources: dict[str, tuple[str, str]]) -> None:
    """Make the cells known to this process's tracebacks. Runs on an engine."""
    for name, (label, source) in sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        _labels[name] = label


def label_of(file_name: str) -> str | None:
    """The label of a notebook cell by its file name; None for other files."""
    return _labels.get(file_name)


def class_marks(namespace: dict[str, Any]) -> dict[str, str]:
    """The marks by which cloudpickle knows the classes that a notebook defined, by name.

    A class sent by value carries its mark, and a process that knows the mark uses the class it has.
    """
    marks = {}
    for name, value in list(namespace.items()):
        if isinstance(value, type) and value.__module__ == "__main__" and not name.startswith("_"):
            marks[name] = cloudpickle_internals._get_or_create_tracker_id(value)
    return marks


def tie_classes(marks: dict[str, str], namespace: dict[str, Any]) -> None:
    """Give the classes of `namespace` the notebook's marks, after both have run the same definition.

    Runs on an engine. Without it, an instance pulled from here would be of a twin of the notebook's class.
    """
    for name, mark in marks.items():
        value = namespace.get(name)
        if isinstance(value, type) and value.__module__ == "__main__":
            cloudpickle_internals._DYNAMIC_CLASS_TRACKER_BY_CLASS[value] = mark
            cloudpickle_internals._DYNAMIC_CLASS_TRACKER_BY_ID[mark] = value
