"""What nbdist uses of IPython, ipykernel and cloudpickle that they do not document. Each has a way without it.

`tests/upstream/test_ipython_private.py` shows that each does what it should, and fails for a version not in `VERIFIED`.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

__all__ = [
    "VERIFIED",
    "answer_while_busy",
    "autoreloaded_text",
    "cell_file",
    "cell_number",
    "class_mark",
    "reload_in_place",
    "run_cells_after_errors",
    "set_class_mark",
]

VERIFIED = {
    "IPython": ("7.34.0", "8.39.0", "9.18.1"),
    "cloudpickle": ("2.2.0", "3.1.2"),
    "ipykernel": ("6.17.1", "7.3.0", "7.4.0"),
}
"""The oldest versions, which were read, and the newest for each Python, which were tested."""


def cell_number(file_name: str) -> int | None:
    """The execution count of the cell that has a file name in this IPython; without it tracebacks name the file."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    numbers: dict[str, int] = getattr(getattr(shell, "compile", None), "_filename_map", {})
    return numbers.get(file_name)


def cell_file(source: str) -> str:
    """The base name of the file that ipykernel gives to a cell; empty without it: hangs then name a file."""
    try:
        from ipykernel.compiler import get_file_name
    except ImportError:
        return ""
    name: str = get_file_name(source)  # type: ignore[no-untyped-call]
    return os.path.basename(name)


def class_mark(kind: type) -> str:
    """The id by which cloudpickle tracks a class; empty without it: a pulled object is then of a twin of the class.

    A class sent by value carries its id; a process that has a class with that id uses it.
    """
    from cloudpickle import cloudpickle

    make = getattr(cloudpickle, "_get_or_create_tracker_id", None)
    return "" if make is None else str(make(kind))


def set_class_mark(kind: type, mark: str) -> None:
    """Let cloudpickle track a class by the id that another process gave it; see `class_mark`."""
    from cloudpickle import cloudpickle

    by_class = getattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", None)
    by_id = getattr(cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_ID", None)
    if mark and by_class is not None and by_id is not None:
        by_class[kind] = mark
        by_id[mark] = kind


def autoreloaded_text(name: str) -> str | None:
    """The text that ``%autoreload`` has for a module, if it is on: it may patch functions without a reload.

    Empty where it has none. IPython before 8.29 always reloads.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    registered: dict[str, Any] = getattr(getattr(shell, "magics_manager", None), "registry", {})
    reloader = getattr(registered.get("AutoreloadMagics"), "_reloader", None)
    if reloader is None or not getattr(reloader, "enabled", False):
        return None
    texts: dict[str, str] = getattr(getattr(reloader, "deduper_reloader", None), "source_by_modname", {})
    return texts.get(name, "")


def reload_in_place(module: ModuleType) -> None:
    """Reload a module as ``%autoreload`` does: functions and classes that exist become the new ones.

    Without IPython's function for it they stay as they are, and what is made later is new.
    """
    try:
        from IPython.extensions.autoreload import superreload
    except ImportError:
        importlib.reload(module)
    else:
        superreload(module, importlib.reload, {})  # type: ignore[no-untyped-call]


def run_cells_after_errors(kernel: Any) -> None:
    """Let a kernel run cells that have arrived when one before them fails; without it they are aborted, by chance.

    ipykernel aborts them, since a notebook sends all of its cells at once. An engine gets each as a call of its own.
    """
    if hasattr(kernel, "_abort_queues"):
        kernel._abort_queues = lambda *_: None


def answer_while_busy(widget: Any) -> None:
    """Let clicks on a widget arrive while a cell is running; where that cannot be, ■ stops a run.

    ipykernel 7.4 handles a widget's messages on the shell that published last, which is busy with this cell; the front
    end's choice of a free subshell must win.
    """
    comm = getattr(widget, "comm", None)
    if comm is not None and hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
