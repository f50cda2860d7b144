"""What has changed in the notebook since the engines started: noted by the kernel, sent with each run and each cell.

Changes are counted, and each engine knows how many it has applied: so each is applied once, on an engine that starts
later all of them, in turn, and what a cell changed on an engine stays until the notebook changes the same.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nbdist.engine.follow.cell_sources import new_cells
from nbdist.engine.follow.module_texts import ModuleText, watched_modules
from nbdist.engine.follow.variables import variables

__all__ = ["Change", "NotebookChanges", "NotebookUpdate", "SearchPath"]


@dataclass(frozen=True, kw_only=True)
class SearchPath:
    """A process's ``sys.path``, absolute, and its Python, whose own folders no other Python may take over."""

    entries: tuple[str, ...]
    python: tuple[str, Any] = (sys.prefix, sys.version_info[:2])


@dataclass(kw_only=True)
class Change:
    """What has changed between two looks at the notebook; a field is empty where nothing has.

    Args:
        cells: New cells: file name -> (label such as ``Cell In[5]``, source).
        path: Where modules are found.
        folder: The working folder.
        variables: Environment variables; None for one that was removed. They may be secret: no text shows them.
        settings: torch's, by name, see `torch_settings`.
        modules: Texts of the user's modules.
    """

    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    path: SearchPath | None = None
    folder: str = ""
    variables: dict[str, str | None] = field(default_factory=dict, repr=False)
    settings: dict[str, Any] = field(default_factory=dict)
    modules: list[ModuleText] = field(default_factory=list, repr=False)

    def __bool__(self) -> bool:
        return bool(self.cells or self.path or self.folder or self.variables or self.settings or self.modules)


@dataclass(frozen=True, kw_only=True)
class NotebookUpdate:
    """What an engine needs from the notebook before it runs its code; see `install`.

    Args:
        of: Identifies the notebook whose changes are counted.
        first: How many changes came before these.
        changes: The changes.
        again: Whether an engine that has them applies them again: before cells of the one that it replaces run there.
    """

    of: str
    first: int
    changes: tuple[Change, ...]
    again: bool = False


class NotebookChanges:
    """Notes what changes in this notebook, and knows what the engines have of it. Local to the kernel.

    Make it before engines start, as they begin with what the notebook has then. Of what changes later, the first change
    holds how it was, for engines that start afterwards.

    Args:
        state: Another kernel's `state`, whose engines this one takes over.
        everything: Whether engines may be where the files of this host are not: they get the texts of all modules.
    """

    def __init__(self, state: Any = None, *, everything: bool = False) -> None:
        self._modules = watched_modules()
        self._modules.look()
        self._had: dict[Hashable, int] = {}
        self._again: set[Hashable] = set()
        self._seen = len(self._modules.noted)
        self._path_as_it_is: Any = None
        self._saved = 0
        fresh: Any = uuid.uuid4().hex, [Change(path=self._new_path())], set(), variables(), _folder(), {}
        self._of: str
        self._changes: list[Change]
        self._cells: set[str]  # the files of those that are known
        self._variables: dict[str, str]
        self._folder: str
        self._settings: dict[str, Any]
        self._of, self._changes, self._cells, self._variables, self._folder, self._settings = state or fresh
        if everything:
            self._changes[0].modules += self._modules.texts()

    @property
    def count(self) -> int:
        """How many changes there are."""
        return len(self._changes)

    @property
    def state(self) -> Any:
        """What another kernel that takes over the engines needs; it can be pickled."""
        return self._of, self._changes, self._cells, self._variables, self._folder, self._settings

    def look(self) -> int:
        """Note what has changed since the last look; returns the `count`. Call it in the thread that runs cells."""
        change, first = Change(cells=new_cells(self._cells), path=self._new_path()), self._changes[0]
        self._cells.update(change.cells)
        now = variables()
        if now != self._variables:
            for name in now.keys() | self._variables.keys():
                if now.get(name) != self._variables.get(name):
                    first.variables.setdefault(name, self._variables.get(name))
                    change.variables[name] = now.get(name)
            self._variables = now
        folder = _folder()
        if folder and folder != self._folder:
            first.folder = first.folder or self._folder
            change.folder = self._folder = folder
        if "torch" in sys.modules:
            from nbdist.core.process.torch_settings import read_settings

            settings = read_settings()
            if settings != self._settings:
                change.settings = {name: value for name, value in settings.items() if value != self._settings.get(name)}
                self._settings = settings
        self._modules.look()
        if len(self._modules.noted) > self._seen:
            change.modules = self._modules.since(self._seen)
            earlier = {one.name for one in first.modules}
            for one in change.modules:
                if one.before is not None and one.name not in earlier:
                    first.modules.append(ModuleText(name=one.name, file=one.file, text=one.before))
            self._seen = len(self._modules.noted)
        if change:
            self._changes.append(change)
        return len(self._changes)

    def _new_path(self) -> SearchPath | None:
        """The present search path; None if it is the one of the last look."""
        now = (_folder(), list(sys.path))
        if now == self._path_as_it_is:
            return None
        self._path_as_it_is = now
        return SearchPath(entries=_absolute(sys.path))

    def update(self, processes: Iterable[Hashable], count: int | None = None) -> NotebookUpdate:
        """What the engines with these processes may lack of the first `count` changes, by default of all."""
        end, alive = self.count if count is None else count, list(processes)
        again = self._again.issuperset(alive)
        if again:
            self._again.difference_update(alive)
        first = min([end, *(self._had.get(process, 0) for process in alive)])
        for process in alive:
            self._had[process] = max(end, self._had.get(process, 0))
        return NotebookUpdate(of=self._of, first=first, changes=tuple(self._changes[first:end]), again=again)

    def save(self, anchor: Any) -> None:
        """Save the state at the anchor, if there is one, for another kernel."""
        if anchor is not None and self._saved != self.count:
            anchor.note("notebook", self.state)
            self._saved = self.count

    def forget(self, processes: Iterable[Hashable] | None = None) -> None:
        """Send all again, as these engines (by default all) may not have got what was sent: each applies it once."""
        for process in list(self._had) if processes is None else processes:
            self._had.pop(process, None)

    def rewind(self, processes: Iterable[Hashable]) -> None:
        """Let these engines apply all again, from the first change on: before cells are run again there."""
        self._again.update(processes)
        self.forget(self._again)


def _folder() -> str:
    """The working folder; empty if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _absolute(entries: Iterable[str]) -> tuple[str, ...]:
    """Entries of ``sys.path``, absolute; an empty one stays too, as it means the folder wherever a cell goes."""
    folder, found = _folder(), list[str]()
    for entry in map(str, entries):
        if not entry:
            found += ["", folder]
        elif folder or os.path.isabs(entry):
            found.append(os.path.realpath(entry))
    return tuple(dict.fromkeys(found))
