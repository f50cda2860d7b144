"""The network interface that torch's backends listen on: loopback within a host, the chosen one between hosts."""

from __future__ import annotations

import os
import sys

from nbdist.telemetry.host import INTERFACE_VARIABLE

__all__ = ["choose_interface"]

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_chosen: dict[str, str] = {}


def choose_interface(*, one_host: bool) -> None:
    """Choose it for the next world; what the user has set in ``$GLOO_SOCKET_IFNAME`` stays. Local.

    Args:
        one_host: Whether all ranks of that world run on this host. The last world's may have run on several.
    """
    between = "" if one_host else os.environ.get(INTERFACE_VARIABLE, "")
    for variable, name in ((_GLOO, _LOOPBACK if one_host else between), (_NCCL, between)):
        if os.environ.get(variable, "") not in ("", _chosen.get(variable)):
            continue
        if name:
            os.environ[variable] = _chosen[variable] = name
        else:
            os.environ.pop(variable, None)
