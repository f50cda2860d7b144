"""This host: its name, and an id that distinguishes it from hosts that share its home folder."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

__all__ = ["INTERFACE_VARIABLE", "NAME_VARIABLE", "host_id", "host_name", "own_address_to"]

INTERFACE_VARIABLE = "NBDIST_INTERFACE"
"""The network interface towards the other hosts; without it gloo looks up its own host's name, and nccl guesses."""

_DISCARD_PORT = 9
_VARIABLE = "NBDIST_HOST"
NAME_VARIABLE = "NBDIST_HOST_NAME"
"""The user's name for this host; set for engines that the user has started on hosts by name."""


def host_name() -> str:
    """The host's name, the same after a reboot: the user's name for it, ``$NBDIST_HOST``, or the network name."""
    return os.environ.get(NAME_VARIABLE) or os.environ.get(_VARIABLE) or socket.gethostname()


def host_id() -> str:
    """Identifies the running system: processes with equal ids can map each other's segments and see each other's pids.

    Set ``$NBDIST_HOST`` where that cannot be detected, as in containers that share a kernel but no files.
    """
    if os.environ.get(_VARIABLE):
        return os.environ[_VARIABLE]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # a container has pids of its own
    except OSError:
        return f"{uuid.getnode():x}"


def own_address_to(name: str) -> str:
    """This host's own address on the way to another host, by its name or address. Nothing is sent.

    Raises:
        OSError: There is no way there, or the name is not known.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((name, _DISCARD_PORT))
        return str(probe.getsockname()[0])
