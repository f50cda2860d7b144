"""Debugger: post-mortem pdb on a rank's last failure. It runs on the engine; the user types in the notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdist.cluster.calls.pending_call import CallError, PendingCall
from nbdist.cluster.hosts.host import Host
from nbdist.errors import ClusterError, interrupted

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
        ClusterError: Nothing has failed there, or its host is lost.
        KeyboardInterrupt: The user interrupted it; the rank is idle again.
    """
    record = engines.records()[rank]
    if (host := engines.host_of(record)) is None:
        raise ClusterError(f"rank {rank} is on {record.host}, which nbdist has not started: no debugger reaches it.")
    path, prompt = host.open_socket(), _prompt(rank)
    call = None
    try:
        call = engines.start_call(rank, "debug", path, rank, prompt)
        _forward(engines, host, path, call, prompt, ask, show)
        call.wait()
        call.result()
    except KeyboardInterrupt:
        host.close_socket(path)
        if call is not None and not call.wait(_LOOK_S):  # the debugger is executing the input
            engines.interrupt([rank])
        raise interrupted(f"the debugger has left rank {rank}.") from None
    except CallError as error:
        if error.kind == "LookupError":
            raise ClusterError(error.message) from None
        raise error.as_error(f"rank {rank}", rank) from None
    finally:
        host.close_socket(path)


def _forward(
    engines: Engines, host: Host, path: str, call: PendingCall, prompt: str, ask: Callable[[str], str],
    show: Callable[[str], None],
) -> None:  # fmt: skip
    """Forward output and input, until the debugger has closed the connection, or its call has ended before it began."""
    output = b""
    while (received := host.receive(path, _LOOK_S)) != b"":
        engines.check_alive()
        if received is None and call.done():
            break
        output += received or b""
        if not output.endswith(prompt.encode()):
            continue
        show(output.decode(errors="replace").removesuffix(prompt).rstrip("\n"))
        output = b""
        host.send(path, f"{ask(prompt)}\n".encode())
    if output:
        show(output.decode(errors="replace"))


def _prompt(rank: int) -> str:
    return f"(rank {rank}) "
