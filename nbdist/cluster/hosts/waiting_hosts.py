"""Hosts between two clusters: their agents, with torch loaded, wait for the next start.

They end with the process, at `end_hosts`, and by themselves once nothing comes from here for the host timeout.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence

from nbdist.cluster.hosts.agents import Agents
from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.keepalive import host_timeout_s
from nbdist.listening import PORTS_VARIABLE

__all__ = ["begin_host", "end_hosts", "waiting_hosts"]

_Place = tuple[str, float, str]
"""This host's address, the host timeout, and the ports that are listened on."""
_Key = tuple[str, tuple[str, ...], _Place]
"""Name, command and place: only a host of which all are the same is used again."""
_owner = os.getpid()
_lock = threading.Lock()
_agents: dict[_Place, Agents] = {}
_hosts: dict[_Key, RemoteHost] = {}


def begin_host(
    name: str, command: Sequence[str], address: str, timeout_s: float, on_lost: Callable[[RemoteHost], None],
    on_terminated: Callable[[RemoteHost], None],
) -> RemoteHost:  # fmt: skip
    """A host for a cluster: the one that waits, else its agent is started.

    Args:
        name: See `Agents.start`.
        command: See `Agents.start`.
        address: Of this host, where the other one reaches it.
        timeout_s: See `RemoteHost.begin`.
        on_lost: See `RemoteHost.begin`.
        on_terminated: See `RemoteHost.begin`.
    """
    where = address, host_timeout_s(), os.environ.get(PORTS_VARIABLE, "")
    key = name, tuple(command), where
    with _lock:
        host = _hosts.get(key)
        if host is None or not host.waits:
            if not _agents:
                atexit.register(end_hosts)
            if where not in _agents:
                _agents[where] = Agents(address)
            host = _hosts[key] = RemoteHost(name, _agents[where].start(name, command), _agents[where])
    host.begin(timeout_s, on_lost, on_terminated)
    return host


def waiting_hosts() -> list[str]:
    """The names of the hosts that wait for a cluster to begin; each once, however it is reached."""
    with _lock:
        return list(dict.fromkeys(host.name for host in _hosts.values() if host.waits))


def end_hosts() -> None:
    """End the agents of all hosts that wait; and the connections to them, if no cluster uses one."""
    if _owner != os.getpid():
        return  # a forked child of the process that they wait for
    with _lock:
        waiting = {key: host for key, host in _hosts.items() if host.waits}
        for host in waiting.values():
            host.hang_up()
        for key, host in waiting.items():
            host.end_agent()
            del _hosts[key]
        for key in [key for key, host in _hosts.items() if host.lost]:
            del _hosts[key]
        if not _hosts:
            for agents in _agents.values():
                agents.close()
            _agents.clear()
