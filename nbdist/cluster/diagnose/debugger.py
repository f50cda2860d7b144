"""A debugger on what failed on one rank: pdb runs on the engine, and reads what a user types in the notebook."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdist.errors import ClusterError, interrupted
from nbdist.peer_auth import same_user

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines

__all__ = ["debug"]

_LOOK_S = 0.1


def debug(engines: Engines, rank: int, ask: Callable[[str], str], tell: Callable[[str], None]) -> None:
    """Let a user look at what failed last on a rank, until they leave it. The other ranks are free meanwhile.

    Args:
        engines: Which are idle.
        rank: Where it failed.
        ask: Shows a prompt and returns what the user types.
        tell: Shows what the debugger says.

    Raises:
        ClusterError: Nothing has failed there, or it is on another host.
        KeyboardInterrupt: The user has interrupted it; the rank is free again.
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


def _prompt(rank: int) -> str:
    return f"(rank {rank}) "
