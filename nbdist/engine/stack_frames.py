"""Stack frames for display: the user's, a library's or nbdist's; file, line and source."""

from __future__ import annotations

import linecache
import traceback

from nbdist.engine.follow.cell_sources import label_of
from nbdist.engine.follow.libraries import OWN_FOLDER, library_folders

__all__ = ["frame_text", "is_ours", "is_plumbing", "is_users", "place_of"]

_CONTEXT = 2


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether it is a frame of nbdist."""
    return frame.filename.startswith(OWN_FOLDER)


def is_users(frame: traceback.FrameSummary) -> bool:
    """Whether it is in a cell, or in a file of no library."""
    if label_of(frame.filename):
        return True
    return not frame.filename.startswith((*library_folders(), "<")) and not is_ours(frame)


def is_plumbing(frame: traceback.FrameSummary) -> bool:
    """Whether it is the call machinery of ``nn.Module``, which is in every stack and explains nothing."""
    return frame.filename.endswith("torch/nn/modules/module.py") and frame.name.endswith("call_impl")


def place_of(frame: traceback.FrameSummary) -> str:
    """File and line, such as ``Cell In[5], line 3``."""
    file = label_of(frame.filename) or frame.filename.rpartition("/site-packages/")[2]
    return f"{file}, line {frame.lineno}"


def frame_text(frame: traceback.FrameSummary) -> str:
    """File, line, function and source line; in a cell, with the lines around it."""
    header = f"{place_of(frame)}, in {frame.name}"
    number = frame.lineno or 0
    around = _CONTEXT if label_of(frame.filename) else 0
    lines = []
    for i in range(max(1, number - around), number + around + 1):
        line = linecache.getline(frame.filename, i)
        if line:
            lines.append(f"{'---->' if i == number else '     '} {i:>3} {line.rstrip()}")
    return "\n".join([header, *lines])
