"""This host: how it is called, and how it is told from others that share a home folder with it."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

__all__ = ["host_id", "host_name"]

_VARIABLE = "NBDIST_HOST"


def host_name() -> str:
    """What people call this host, whenever it was started: its name, or ``$NBDIST_HOST``."""
    return os.environ.get(_VARIABLE) or socket.gethostname()


def host_id() -> str:
    """Names the running system: processes with the same one can map each other's segments, and see each other.

    ``$NBDIST_HOST`` names it where that cannot be seen from inside, as in containers that share a kernel but no files.
    """
    if os.environ.get(_VARIABLE):
        return os.environ[_VARIABLE]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # a container has process numbers of its own
    except OSError:
        return f"{uuid.getnode():x}"
