"""Cell sources on the engines, for tracebacks; and the notebook's ``sys.path`` and classes there."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdist.upstream.ipython_private import cell_number, class_mark, set_class_mark

__all__ = [
    "CellSources",
    "NotebookUpdate",
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
    """What engines need from the notebook before they run its code.

    Args:
        sources: File name -> (label such as ``Cell In[5]``, source) of cells.
        path: The notebook's ``sys.path``.
    """

    sources: dict[str, tuple[str, str]]
    path: list[str]


class CellSources:
    """Tracks which cells of this notebook the engines have."""

    def __init__(self) -> None:
        self._sent: set[str] = set()
        self._processes: frozenset[Hashable] = frozenset()  # to which they were sent

    def new(self, processes: Iterable[Hashable]) -> NotebookUpdate:
        """The cells that one of the engines may lack, and the current ``sys.path``; it is sent to all of them.

        Args:
            processes: The engines' processes. One that is new has no cell.
        """
        now = frozenset(processes)
        if not now <= self._processes:
            self._sent.clear()
        self._processes = now
        fresh = {
            name: (_cell_label(name), "".join(entry[2]))
            for name, entry in list(linecache.cache.items())
            # Entries without a modification time are no files but cells, put there by IPython or by nbdist.
            if len(entry) == 4 and entry[1] is None and name not in self._sent
        }
        self._sent.update(fresh)
        return NotebookUpdate(sources=fresh, path=search_path())

    def forget(self) -> None:
        """Send all cells again: ranks were interrupted, perhaps before they had taken them."""
        self._sent.clear()


def _cell_label(name: str) -> str:
    """IPython's own label for the file name that it gave a cell, such as ``Cell In[5]``."""
    number = cell_number(name)
    return name if number is None else f"Cell In[{number}]"


def install(update: NotebookUpdate) -> None:
    """Add cells to this process's linecache, and the notebook's ``sys.path`` to its own."""
    for name, (label, source) in update.sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        _labels[name] = label
    known = set(search_path())
    sys.path += [entry for entry in update.path if entry not in known]


def search_path() -> list[str]:
    """This process's ``sys.path``, absolute; a cell may have added to it since the engines started."""
    return [str(Path(entry or ".").resolve()) for entry in sys.path]


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
