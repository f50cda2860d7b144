"""Another user of this host, a real second uid: root runs a function in a fork as user nobody."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

needs_another_user = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="only root can become another user, and only Linux tells users"
)


def in_fork(act, *args):
    """Call ``act(*args)`` in a fork; returns its JSON value, or the name of its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            result = act(*args)
        except BaseException as error:
            result = type(error).__name__
        os.write(writing, json.dumps(result).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def as_other_user(act, *args):
    """`in_fork`, as user nobody."""
    return in_fork(_as_nobody, act, *args)


def _as_nobody(act, *args):
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
    return act(*args)


@contextlib.contextmanager
def other_user_listens(address: str, answer, *args) -> Iterator[Callable[[], Any]]:
    """User nobody listens at an address, and calls ``answer(peer, *args)`` when this process has connected.

    Yields:
        A function that waits for the answer's value.
    """
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe, ThreadPoolExecutor(1) as pool:
        answered = pool.submit(as_other_user, _listen, address, writing, answer, args)
        answered.add_done_callback(lambda _: os.close(writing))
        assert pipe.read(1), answered.result()
        try:
            yield answered.result
        finally:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as peer:
                peer.connect(address)  # if the test has not


def _listen(address, ready, answer, args):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        os.write(ready, b"x")
        with listener.accept()[0] as peer:
            return answer(peer, *args)


def all_received(peer):
    """What the other side says, though nothing is said to it."""
    peer.shutdown(socket.SHUT_WR)
    with peer.makefile(errors="replace") as stream:
        return stream.read()


@contextlib.contextmanager
def reachable(folder: Path) -> Iterator[None]:
    """Let every user reach a folder, whose own mode stays: pytest makes its temporary folders private."""
    changed = [(above, above.stat().st_mode & 0o777) for above in folder.parents if not above.stat().st_mode & 0o001]
    for above, mode in changed:
        above.chmod(mode | 0o001)
    try:
        yield
    finally:
        for above, mode in changed:
            above.chmod(mode)
