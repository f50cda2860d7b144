"""A debugger on what failed on one rank: pdb runs on the engine, and reads what a person types in the notebook."""

from __future__ import annotations

import contextlib
import os
import pdb
import select
import socket
import sys
import traceback
import types
from collections.abc import Callable

from nbdist.cluster import entry
from nbdist.cluster.definitions import label_of
from nbdist.cluster.engines import Engines
from nbdist.cluster.frames import is_users
from nbdist.doorkeeper import same_user
from nbdist.errors import ClusterError, interrupted, ranks_text

__all__ = ["debug", "serve"]

_LOOK_S = 0.1


def debug(engines: Engines, rank: int, ask: Callable[[str], str], tell: Callable[[str], None]) -> None:
    """Let a person look at what failed last on a rank, until they leave it. The other ranks are free meanwhile.

    Args:
        engines: Which are idle.
        rank: Where it failed.
        ask: Shows a prompt and returns what the person types.
        tell: Shows what the debugger says.

    Raises:
        ClusterError: Nothing has failed there, or it is on another host.
        KeyboardInterrupt: The person has interrupted it; the rank is free again.
    """
    where = engines.records()[rank]
    if where.host_id != engines.host_id:
        raise ClusterError(f"rank {rank} is on {where.host}: a debugger reaches ranks of this host only.")
    path, prompt = os.path.join(engines.folder, f"debug-{os.urandom(4).hex()}"), _prompt(rank)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        call = engines.start_call(rank, serve, path, rank)
        try:
            while not select.select([listener], [], [], _LOOK_S)[0]:
                engines.check_alive()
                if call.ready():
                    call.get()
                    return
            with listener.accept()[0] as connection:
                if not same_user(connection):
                    raise ClusterError("another user's process called in place of the debugger: start it again.")
                _converse(connection, prompt, ask, tell)
            call.wait()
        except KeyboardInterrupt:
            if not call.wait(_LOOK_S):  # it works on what was typed
                engines.interrupt([rank])
            raise interrupted(f"the debugger has left rank {rank}.") from None
        except Exception as error:
            if getattr(error, "ename", "") == "LookupError":
                raise ClusterError(str(getattr(error, "evalue", error))) from None
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _converse(connection: socket.socket, prompt: str, ask: Callable[[str], str], tell: Callable[[str], None]) -> None:
    """Carry words there and back, until the debugger has closed the connection."""
    said = b""
    while received := connection.recv(1 << 16):
        said += received
        if not said.endswith(prompt.encode()):
            continue
        tell(said.decode(errors="replace").removesuffix(prompt).rstrip("\n"))
        said = b""
        connection.sendall(f"{ask(prompt)}\n".encode())
    if said:
        tell(said.decode(errors="replace"))


def serve(path: str, rank: int) -> None:
    """Run the debugger for whoever listens at `path`. Runs on an engine, until that person leaves it.

    Raises:
        LookupError: Nothing has failed here.
    """
    error = entry.last_failure() or getattr(sys, "last_value", None)
    if error is None or error.__traceback__ is None:
        raise LookupError(f"nothing has failed on rank {rank}.")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        if not same_user(connection):
            raise PermissionError(f"another user's process listens at {path}.")
        with connection.makefile("rw", buffering=1, errors="replace") as stream:
            stream.write(f"{ranks_text([rank])}: {type(error).__name__}: {error}\n")
            debugger = _Debugger(stdin=stream, stdout=stream, nosigint=True, readrc=False)
            debugger.prompt = _prompt(rank)
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
    """How many frames lie above the person's own innermost one; 0 where there is none."""
    stack = [_summary(frame, line) for frame, line in traceback.walk_tb(tb)]
    mine = [i for i, frame in enumerate(stack) if is_users(frame)]
    return len(stack) - 1 - mine[-1] if mine else 0


def _summary(frame: types.FrameType, line: int) -> traceback.FrameSummary:
    return traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)


def _prompt(rank: int) -> str:
    return f"(rank {rank}) "
