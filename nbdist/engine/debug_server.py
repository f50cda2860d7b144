"""Debug server: post-mortem pdb on an engine, whose input and output go to the notebook through a socket."""

from __future__ import annotations

import pdb
import socket
import traceback
import types

from nbdist.engine.follow.cell_sources import label_of
from nbdist.engine.stack_frames import is_users
from nbdist.errors import ranks_text
from nbdist.peer_auth import same_user

__all__ = ["serve"]


def serve(path: str, rank: int, prompt: str, error: BaseException | None) -> None:
    """Run the debugger for the kernel that listens at `path`, until the user quits. Runs on an engine.

    Args:
        path: Of the socket.
        rank: This rank.
        prompt: The debugger's prompt, which ends each of its answers.
        error: The failure; None if there is none.

    Raises:
        LookupError: Nothing has failed here.
    """
    if error is None or error.__traceback__ is None:
        raise LookupError(f"nothing has failed on rank {rank}.")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        if not same_user(connection):
            raise PermissionError(f"another user's process listens at {path}.")
        with connection.makefile("rw", buffering=1, errors="replace") as stream:
            stream.write(f"{ranks_text([rank])}: {type(error).__name__}: {error}\n")
            debugger = _Debugger(stdin=stream, stdout=stream, nosigint=True, readrc=False)
            debugger.prompt = prompt
            if above := _above_users(error.__traceback__):
                debugger.cmdqueue.append(f"up {above}")
            debugger.reset()
            debugger.interaction(None, error.__traceback__)


class _Debugger(pdb.Pdb):
    """pdb that shows a cell's label, such as ``Cell In[5]``, instead of its file name."""

    def format_stack_entry(self, frame_lineno: tuple[types.FrameType, int], lprefix: str = ": ") -> str:
        """See `bdb.Bdb`."""
        text, file = super().format_stack_entry(frame_lineno, lprefix), frame_lineno[0].f_code.co_filename
        return text.replace(file, label_of(file) or file)


def _above_users(tb: types.TracebackType) -> int:
    """How many frames are below the user's innermost one, for pdb's ``up``; 0 if no frame is the user's."""
    stack = [_summary(frame, line) for frame, line in traceback.walk_tb(tb)]
    mine = [i for i, frame in enumerate(stack) if is_users(frame)]
    return len(stack) - 1 - mine[-1] if mine else 0


def _summary(frame: types.FrameType, line: int) -> traceback.FrameSummary:
    return traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)
