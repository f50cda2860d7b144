"""Debugger: post-mortem pdb on a rank's last failure. It runs on the engine; the user types in the notebook."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdist.cluster.calls.pending_call import CallError
from nbdist.errors import ClusterError, interrupted
from nbdist.peer_auth import same_user

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines

__all__ = ["debug"]

_LOOK_S = 0.1


def debug(engines: Engines, rank: int, ask: Callable[[str], str], show: Callable[[str], None]) -> None:
    """Debug the last failure on a rank, until the user quits. The other ranks are idle meanwhile.

    Args:
        engines: Idle engines.
        rank: The rank that failed.
        ask: Shows a prompt and returns the user's input.
        show: Shows the debugger's output.

    Raises:
        ClusterError: Nothing has failed there, or it is on another host.
        KeyboardInterrupt: The user interrupted it; the rank is idle again.
    """
    where = engines.records()[rank]
    if where.host_id != engines.host_id:
        raise ClusterError(f"rank {rank} is on {where.host}: a debugger reaches ranks of this host only.")
    path, prompt = os.path.join(engines.folder, f"debug-{os.urandom(4).hex()}"), _prompt(rank)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        call = engines.start_call(rank, "debug", path, rank, prompt)
        try:
            while not select.select([listener], [], [], _LOOK_S)[0]:
                engines.check_alive()
                if call.done():
                    call.result()
                    return
            with listener.accept()[0] as connection:
                if not same_user(connection):
                    raise ClusterError("another user's process connected instead of the debugger: start it again.")
                _forward(connection, prompt, ask, show)
            call.wait()
        except KeyboardInterrupt:
            if not call.wait(_LOOK_S):  # the debugger is executing the input
                engines.interrupt([rank])
            raise interrupted(f"the debugger has left rank {rank}.") from None
        except CallError as error:
            if error.kind == "LookupError":
                raise ClusterError(error.message) from None
            raise error.as_error(f"rank {rank}", rank) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _forward(connection: socket.socket, prompt: str, ask: Callable[[str], str], show: Callable[[str], None]) -> None:
    """Forward output and input, until the debugger has closed the connection."""
    output = b""
    while received := connection.recv(1 << 16):
        output += received
        if not output.endswith(prompt.encode()):
            continue
        show(output.decode(errors="replace").removesuffix(prompt).rstrip("\n"))
        output = b""
        connection.sendall(f"{ask(prompt)}\n".encode())
    if output:
        show(output.decode(errors="replace"))


def _prompt(rank: int) -> str:
    return f"(rank {rank}) "
