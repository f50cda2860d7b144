"""The debugger of one rank: pdb on its engine, which reads from a socket what a user types in the notebook."""

from __future__ import annotations

import pdb
import socket
import traceback
import types

from nbdist.engine.cell_sources import label_of
from nbdist.engine.stack_frames import is_users
from nbdist.errors import ranks_text
from nbdist.peer_auth import same_user

__all__ = ["serve"]


def serve(path: str, rank: int, prompt: str, error: BaseException | None) -> None:
    """Run the debugger for whoever listens at `path`. Runs on an engine, until that user leaves it.

    Args:
        path: Of the socket.
        rank: This one's.
        prompt: What the debugger ends each answer with.
        error: What failed; None where nothing has.

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
    """pdb that calls cells as people know them."""

    def format_stack_entry(self, frame_lineno: tuple[types.FrameType, int], lprefix: str = ": ") -> str:
        """See `bdb.Bdb`."""
        text, file = super().format_stack_entry(frame_lineno, lprefix), frame_lineno[0].f_code.co_filename
        return text.replace(file, label_of(file) or file)


def _above_users(tb: types.TracebackType) -> int:
    """How many frames lie above the user's own innermost one; 0 where there is none."""
    stack = [_summary(frame, line) for frame, line in traceback.walk_tb(tb)]
    mine = [i for i, frame in enumerate(stack) if is_users(frame)]
    return len(stack) - 1 - mine[-1] if mine else 0


def _summary(frame: types.FrameType, line: int) -> traceback.FrameSummary:
    return traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)
