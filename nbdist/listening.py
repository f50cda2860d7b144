"""Which TCP ports nbdist listens on: any free ones, or those of a range that a firewall lets through.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import socket

__all__ = ["PORTS_VARIABLE", "listen_on", "parse_ports", "use_ports"]

PORTS_VARIABLE = "NBDIST_PORTS"
"""The range, such as 10125-10160; empty for any free ports. Each process takes it from there."""


_users = os.environ.get(PORTS_VARIABLE)


def use_ports(ports: range) -> None:
    """Let this process and its children listen on these ports from now on; on those of the user if there are none."""
    if ports:
        os.environ[PORTS_VARIABLE] = f"{ports[0]}-{ports[-1]}"
    elif _users is None:
        os.environ.pop(PORTS_VARIABLE, None)
    else:
        os.environ[PORTS_VARIABLE] = _users


def parse_ports(text: str) -> range:
    """The ports of ``FIRST-LAST``; none of an empty text.

    Raises:
        ValueError: It has another form.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if not found or not 1024 <= int(found[1]) <= int(found[2]) < 1 << 16:
        raise ValueError(f"{text!r} is no range of ports: use FIRST-LAST, such as 10101-10160")
    return range(int(found[1]), int(found[2]) + 1)


def listen_on(address: str, backlog: int) -> socket.socket:
    """A socket that listens on this host, on a port of the range, or on any if there is none.

    Args:
        address: This host's.
        backlog: See `socket.socket.listen`.

    Raises:
        OSError: All are taken.
    """
    ports = parse_ports(os.environ.get(PORTS_VARIABLE, ""))
    for port in ports or (0,):
        listener = socket.socket()
        try:
            if port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of connections that have just ended
            listener.bind((address, port))
            listener.listen(backlog)
        except OSError as error:
            listener.close()
            if not port or error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
    raise OSError(errno.EADDRINUSE, f"all ports of {ports[0]}-{ports[-1]} are taken on this host: give more")
