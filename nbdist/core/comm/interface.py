"""The network interface between hosts: the chosen one, or the one that leads to the store. Within a host, loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import Any

import psutil

from nbdist.listening import PORTS_VARIABLE
from nbdist.telemetry.host import INTERFACE_VARIABLE, own_address_to

__all__ = ["address_towards", "choose_interface", "own_address"]

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_LOOPBACK_ADDRESS = "127.0.0.1"
_GLOO, _NCCL, _LAZY = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_GLOO_LAZY_INIT"
_chosen: dict[str, str] = {}


def choose_interface(*, one_host: bool) -> None:
    """Choose it for the next world; what the user has set in ``$GLOO_SOCKET_IFNAME`` stays. Local.

    Args:
        one_host: Whether all ranks of that world run on this host. The last world's may have run on several.
    """
    between = "" if one_host else os.environ.get(INTERFACE_VARIABLE, "")
    lazily = "" if one_host or not os.environ.get(PORTS_VARIABLE) else "1"  # gloo listens on any port
    for variable, name in ((_GLOO, _LOOPBACK if one_host else between), (_NCCL, between), (_LAZY, lazily)):
        if os.environ.get(variable, "") not in ("", _chosen.get(variable)):
            continue
        if name:
            os.environ[variable] = _chosen[variable] = name
        else:
            os.environ.pop(variable, None)


def own_address(store: Any) -> str:
    """This host's address towards the other hosts of a world; on loopback if only that leads to the store. Local.

    Args:
        store: That all ranks share: nbdist's, or torchrun's, which is at ``$MASTER_ADDR``.
    """
    chosen = os.environ.get(INTERFACE_VARIABLE) or os.environ.get(_GLOO, "")
    for each in psutil.net_if_addrs().get(chosen, ()):
        if each.family == socket.AF_INET:
            return str(each.address)
    return address_towards(getattr(store, "address", ("",))[0].rpartition(":")[0] or os.environ.get("MASTER_ADDR", ""))


def address_towards(name: str) -> str:
    """This host's address on the way to a host; loopback if that cannot be found. Local; nothing is sent."""
    if not name:
        return _LOOPBACK_ADDRESS
    with contextlib.suppress(OSError):
        return own_address_to(name)
    return _LOOPBACK_ADDRESS
