"""A shell's line on the host of the user's own ipyparallel engine, as ssh runs one: it gets this standard input.

The line is a child of that engine, which starts it in no time and is free again; the input ends with the engine.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from typing import Any, NoReturn

from nbdist.telemetry.host import host_id, own_address_to

__all__ = ["begin", "close", "describe", "ended", "write"]

_LOG_BYTES = 1 << 14
_ANSWERED_WITHIN_S = 30.0
_CLOSED_WITHIN_S = 1.0
_FIRST_LOOK_S, _LOOKS_WITHIN_S = 0.1, 30.0
"""Whether the line has ended is asked ever more seldom, and then no more: the engine is the user's."""

_children: dict[int, tuple[subprocess.Popen[bytes], Any]] = {}
"""In the engine: each line's process, and what it has written."""


def describe(controller: str) -> dict[str, str]:
    """In the engine: its host's id, its Python, and the address there on the way to the controller, if there is one."""
    address = ""
    with contextlib.suppress(OSError):
        address = own_address_to(controller)
    return {"host_id": host_id(), "python": sys.executable, "address": address, "name": os.uname().nodename}


def begin(line: str) -> int:
    """In the engine: run a line; returns its number, for the following."""
    written = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the line)
    child = subprocess.Popen(
        ["sh", "-c", line], stdin=subprocess.PIPE, stdout=written, stderr=written, start_new_session=True, bufsize=0
    )
    _children[child.pid] = child, written
    return child.pid


def write(number: int, data: bytes) -> None:
    """In the engine: give a line more input."""
    stdin = _children[number][0].stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended
        stdin.write(data)


def ended(number: int) -> tuple[int, str] | None:
    """In the engine: the exit status of a line, and the end of what it has written; None while it runs."""
    child, written = _children[number]
    if child.poll() is None:
        return None
    start = max(0, os.fstat(written.fileno()).st_size - _LOG_BYTES)
    return child.returncode, os.pread(written.fileno(), _LOG_BYTES, start).decode(errors="replace")


def close(number: int) -> None:
    """In the engine: end a line's input, and forget lines that have ended."""
    stdin = _children[number][0].stdin
    assert stdin is not None
    stdin.close()
    for other, (child, written) in list(_children.items()):
        if child.poll() is not None:
            written.close()
            del _children[other]


def _fail(text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(1)


def _first_free(client: Any, host: str, engines: Collection[int]) -> int:
    """The engine of a host with the least to do; one that has started there since, if none of these lives."""
    living = [engine for engine in engines if engine in client.ids]
    if not living:
        calls = {engine: client[engine].apply_async(describe, "") for engine in client.ids}
        client.wait(list(calls.values()), timeout=_ANSWERED_WITHIN_S)
        found = {engine: call.get() for engine, call in calls.items() if call.ready() and call.successful()}
        living = [engine for engine, about in found.items() if about["name"] == host]
    if not living:
        _fail("none of its engines runs any more")
    queues = client.queue_status(targets=living)
    return min(living, key=lambda engine: queues[engine]["queue"] + queues[engine]["tasks"])


def main() -> None:
    """Entry point. Arguments: the cluster's connection file, a host, the ids of engines there, and the line."""
    import ipyparallel

    file, host, engines, line = sys.argv[1:5]
    try:
        client = ipyparallel.Client(file, timeout=_ANSWERED_WITHIN_S)
    except TimeoutError:
        _fail("its ipyparallel cluster does not answer")
    engine = _first_free(client, host, [int(each) for each in engines.split(",")])
    view = client[engine]
    try:
        number = view.apply_async(begin, line).get(_ANSWERED_WITHIN_S)
    except TimeoutError:
        _fail(f"engine {engine} of its ipyparallel cluster is busy")
    began_s, wait_s = time.monotonic(), _FIRST_LOOK_S
    while True:
        looks = time.monotonic() - began_s < _LOOKS_WITHIN_S
        readable, _, _ = select.select([0], [], [], wait_s if looks else None)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                break
            view.apply_async(write, number, data)
        elif (found := view.apply_async(ended, number).get(_ANSWERED_WITHIN_S)) is not None:
            sys.stderr.write(found[1])
            sys.exit(found[0] or 1)
        else:
            wait_s *= 2
    with contextlib.suppress(Exception):  # the engine is busy or has ended: the input ends with it
        view.apply_async(close, number).get(_CLOSED_WITHIN_S)


if __name__ == "__main__":
    main()
