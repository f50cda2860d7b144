"""An engine takes over what has changed in the notebook."""

from __future__ import annotations

import os
import sys

from nbdist.engine.follow.cell_sources import add_cells
from nbdist.engine.follow.changes import Change, NotebookUpdate, SearchPath
from nbdist.engine.follow.module_texts import ModuleText, watched_modules
from nbdist.engine.follow.variables import set_variables

__all__ = ["install"]


class _Installed:
    """What this engine has of the notebook."""

    of = ""
    count = 0
    path: tuple[str, ...] = ()


def install(update: NotebookUpdate) -> list[str]:
    """Apply the changes that this process has not applied yet. Local, in the thread that runs cells.

    Interrupted, it may be called again.

    Returns:
        Sentences for the user: what cannot be as in the notebook.
    """
    if update.of != _Installed.of or update.again:
        _Installed.of, _Installed.count = update.of, 0
    fresh = update.changes[max(0, _Installed.count - update.first) :]
    notes: list[str] = []
    for change in fresh:
        notes = _apply(change, notes)
    texts: dict[str, ModuleText] = {}
    for one in (one for change in fresh for one in change.modules):
        before = texts.pop(one.name, None)  # the last of them, in the order in which they ran last
        texts[one.name] = one if before is None or one.reloaded or not before.reloaded else before
    modules = watched_modules()
    for one in texts.values():
        modules.give(one)
    notes += modules.reload()
    _Installed.count = max(_Installed.count, update.first + len(update.changes))
    return notes


def _apply(change: Change, notes: list[str]) -> list[str]:
    """Apply all of a change but for modules; returns the notes after it, those on the last folder."""
    add_cells(change.cells)
    set_variables(change.variables)
    if change.folder:
        notes = []
        try:
            os.chdir(change.folder)
        except OSError as error:  # deleted, or of another host
            reason = error.strerror or type(error).__name__
            notes = [f"the notebook's folder {change.folder} cannot be entered here ({reason})"]
    if change.path is not None:
        _set_path(change.path)
    if change.settings:
        from nbdist.core.process.torch_settings import set_settings

        set_settings(change.settings)
    return notes


def _set_path(path: SearchPath) -> None:
    """Find modules where the notebook finds them; what is only this process's own comes after it.

    Another Python's folders come last: its packages may not fit here.
    """
    if path.python == SearchPath(entries=()).python:
        own = [entry for entry in sys.path if entry not in path.entries and entry not in _Installed.path]
        sys.path[:] = [*path.entries, *own]
    else:
        sys.path += [entry for entry in path.entries if entry not in sys.path]
    _Installed.path = path.entries
