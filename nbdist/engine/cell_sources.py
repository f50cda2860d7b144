"""Definitions of the notebook on the engines: source lines, where modules are found, one identity for one class."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle.cloudpickle as cloudpickle_internals

__all__ = [
    "CellSources",
    "NotebookUpdate",
    "cell_file",
    "class_marks",
    "install",
    "label_of",
    "labelled",
    "search_path",
    "tie_classes",
]

_labels: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class NotebookUpdate:
    """What engines need to know of the notebook before they run something of it.

    Args:
        sources: File name -> (label for people, source) of cells.
        path: Where the notebook finds modules.
    """

    sources: dict[str, tuple[str, str]]
    path: list[str]


@dataclass
class CellSources:
    """The cells of this notebook that the engines have not been told of yet."""

    sent: set[str] = field(default_factory=set)

    def new(self) -> NotebookUpdate:
        """The cells that were not returned before, and where modules are found now."""
        fresh = {
            name: (_cell_label(name), "".join(entry[2]))
            for name, entry in list(linecache.cache.items())
            # Entries without a modification time are not files: cells of a notebook, put there by IPython or by us.
            if len(entry) == 4 and entry[1] is None and name not in self.sent
        }
        self.sent.update(fresh)
        return NotebookUpdate(sources=fresh, path=search_path())

    def all(self) -> NotebookUpdate:
        """All cells, for engines that may know none."""
        self.sent.clear()
        return self.new()


def _cell_label(name: str) -> str:
    """IPython's own label for the file name that it gave a cell, such as ``Cell In[5]``."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    numbers = getattr(getattr(shell, "compile", None), "_filename_map", {})  # private: a better label, no more
    return f"Cell In[{numbers[name]}]" if name in numbers else name


def cell_file(source: str) -> str:
    """The name, without its folder, of the file by which an engine's tracebacks know a cell; empty if unknown."""
    try:
        from ipykernel.compiler import get_file_name  # private: better tracebacks of cells that hang, no more
    except ImportError:
        return ""
    return os.path.basename(get_file_name(source))


def install(news: NotebookUpdate) -> None:
    """Make cells known to this process's tracebacks, and find modules where the notebook does."""
    for name, (label, source) in news.sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        _labels[name] = label
    known = set(search_path())
    sys.path += [entry for entry in news.path if entry not in known]


def search_path() -> list[str]:
    """Where this process finds modules; a cell may have added to it since the engines started."""
    return [str(Path(entry or ".").resolve()) for entry in sys.path]


def labelled(text: str) -> str:
    """A text in which the files of cells are called as people know them. Runs on an engine."""
    for name, label in _labels.items():
        text = text.replace(os.path.basename(name), label)
    return text


def label_of(file_name: str) -> str | None:
    """The label of a cell by its file name, of the notebook or of this process; None for other files."""
    if file_name in _labels:
        return _labels[file_name]
    own = _cell_label(file_name)
    return None if own == file_name else own


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
