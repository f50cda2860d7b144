"""Reserved ports: numbers of TCP ports that nobody else gets, for a program that binds them later.

ipyparallel's controller chooses free ports and closes them again, before its processes bind them; meanwhile any
connection on the host may get one as its own end. Then a part of the controller ends, and engines start in vain.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from nbdist.errors import ClusterError

__all__ = ["ReservedPorts"]


class ReservedPorts:
    """Ports that are bound here and not listened on: Linux gives them to nobody but who asks for their numbers.

    Elsewhere there are none.

    Args:
        wanted: Their numbers; 0 for any.

    Attributes:
        numbers: Their numbers.

    Raises:
        ClusterError: One is taken.
    """

    def __init__(self, wanted: Sequence[int]) -> None:
        self._sockets = [socket.socket() for _ in wanted if sys.platform == "linux"]
        for each, number in zip(self._sockets, wanted, strict=False):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does, which can then bind it too
            try:
                each.bind(("", number))
            except OSError as error:
                self.close()
                raise ClusterError(f"port {number} of --ports cannot be used here ({error.strerror}).") from None
        self.numbers = [int(each.getsockname()[1]) for each in self._sockets]

    def close(self) -> None:
        """Release those that nobody has bound. Twice is fine."""
        for each in self._sockets:
            each.close()
