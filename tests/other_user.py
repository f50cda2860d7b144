"""Another user of this host, a real second uid: root runs a function in a fork as user nobody."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_another_user = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="only root can become another user, and only Linux tells users"
)


def as_other_user(act, *args):
    """Call ``act(*args)`` in a fork that is user nobody; returns its JSON value, or the name of its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        nobody = pwd.getpwnam("nobody")
        os.close(reading)
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
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
