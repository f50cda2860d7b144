"""Where libraries lie: what is elsewhere is the user's own code."""

from __future__ import annotations

import functools
import importlib.util
import os
import site
import sysconfig
from pathlib import Path

__all__ = ["OWN_FOLDER", "is_users_module", "library_folders"]

OWN_FOLDER = str(Path(__file__).parents[2])
"""nbdist's own."""
_PACKAGES = ("torch", "numpy", "IPython", "ipykernel", "ipyparallel", "tornado", "traitlets", "zmq")


@functools.cache
def library_folders() -> tuple[str, ...]:
    """Folders of libraries: Python's, the user's site-packages, and our dependencies' wherever installed."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {site.getusersitepackages(), *site.getsitepackages()}
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.origin:
            folders.add(str(Path(found.origin).parent))
    return tuple(f"{folder}/" for folder in folders)


def is_users_module(file: str | None) -> bool:
    """Whether the file of a module is Python's text, and in the folder of no library."""
    if not file or not file.endswith(".py") or not os.path.isabs(file):  # torch makes modules without a folder
        return False
    return not file.startswith((*library_folders(), f"{OWN_FOLDER}/"))
