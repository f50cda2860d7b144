"""The other hosts of a launch: begun by their agents, tried again when they are lost, ended with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.host import Host
from nbdist.cluster.hosts.proxied_agents import ProxiedAgents
from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.cluster.hosts.waiting_hosts import begin_host
from nbdist.cluster.launch.lost_hosts import LostHosts
from nbdist.errors import ClusterError

__all__ = ["OtherHosts"]


class OtherHosts:
    """Their agents wait for the next cluster of this kernel afterwards, or belong to an anchor and end with it.

    Args:
        launcher: Starts their agents.
        address: Of this host, where they reach it.
        timeout_s: How long an agent may take to answer first, in seconds.
        proxy: The path of the anchor's proxy; empty without one.

    Attributes:
        on_lost: Called with the id of a host that is lost, in a thread.
        on_back: Called with a host that takes the place of a lost one, in a thread.
        on_terminated: See `RemoteHost.begin`.
    """

    def __init__(self, launcher: AgentLauncher, address: str, timeout_s: float, proxy: str = "") -> None:
        self._launcher, self._address, self._timeout_s = launcher, address, timeout_s
        self._proxy = ProxiedAgents(proxy) if proxy else None
        self._hosts: list[RemoteHost] = []
        self._newest: dict[str, RemoteHost] = {}
        self._lost = LostHosts(self._begin, self._rejoin)
        self.on_lost: Callable[[str], None] = lambda host_id: None
        self.on_back: Callable[[RemoteHost], None] = lambda host: None
        self.on_terminated: Callable[[RemoteHost], None] = lambda host: host.hang_up()

    def add(self, name: str) -> Host:
        """Start the agent of a host."""
        return self._keep(self._begin(name))

    @classmethod
    def attach(cls, noted: Mapping[str, Any], proxy: str) -> OtherHosts:
        """The hosts that another kernel has begun.

        Args:
            noted: What it has noted, see `note`.
            proxy: See `OtherHosts`.
        """
        others = cls(noted["launcher"], noted["address"], noted["timeout_s"], proxy)
        assert others._proxy is not None
        for name, identity in noted["identities"].items():
            host = others._keep(RemoteHost(name, identity, others._proxy))
            host.begin(others._timeout_s, others._note_lost, others._note_terminated)
            with contextlib.suppress(ClusterError):
                host.facts  # noqa: B018  (waits for the answer)
                host.adopt()
            if host.lost:
                others._note_lost(host)
        return others

    def note(self) -> dict[str, Any]:
        """What another kernel needs to `attach`."""
        identities = {name: host.identity for name, host in self._newest.items()}
        return {
            "launcher": self._launcher, "address": self._address, "timeout_s": self._timeout_s,
            "identities": identities,
        }  # fmt: skip

    @property
    def newest(self) -> dict[str, RemoteHost]:
        """The hosts by name, the one that is back in place of the lost one."""
        return dict(self._newest)

    def begin_end(self) -> None:
        """Begin to end all that was started there, without waiting for it."""
        self._lost.close()
        for host in self._hosts:
            if self._proxy is None:
                host.begin_end()
            else:
                host.hang_up()

    def end(self) -> None:
        """End all that was started there. Twice is fine."""
        hosts, self._hosts = self._hosts, []  # the next cluster may use them already
        for host in hosts:
            if self._proxy is None:
                host.end()
            else:
                host.end_agent()
        if self._proxy is not None:
            self._proxy.close()

    def _begin(self, name: str) -> RemoteHost:
        command = self._launcher.agent_command(name)
        if self._proxy is None:
            return begin_host(name, command, self._address, self._timeout_s, self._note_lost, self._note_terminated)
        host = RemoteHost(name, self._proxy.start(name, command), self._proxy)
        host.begin(self._timeout_s, self._note_lost, self._note_terminated)
        return host

    def _keep(self, host: RemoteHost) -> RemoteHost:
        self._hosts.append(host)
        self._newest[host.name] = host
        return host

    def _note_lost(self, host: RemoteHost) -> None:
        """In the thread that receives all answers: it must not wait for one."""
        host.hang_up()  # its agent may live, and count itself as connected: of two sides only one goes on
        if host.answered:  # else nothing ran there
            self.on_lost(host.facts.host_id)
            self._lost.seek(host.name)

    def _note_terminated(self, host: RemoteHost) -> None:
        self.on_terminated(host)

    def _rejoin(self, host: RemoteHost) -> None:
        """Use a host that was lost: what ran there before has ended."""
        host.note_ended(self._newest[host.name].started)
        self.on_back(self._keep(host))
