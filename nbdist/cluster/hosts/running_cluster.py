"""A running cluster of ipyparallel, the user's own: on its hosts are agents started, through one of its engines each.

Its engines stay the user's; nothing is run on them but what starts an agent, and ends it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdist.cluster.hosts import engine_shell
from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.allocation import Allocation
from nbdist.cluster.hosts.host_choice import LOCAL
from nbdist.errors import ClusterError, PlanError, suggest
from nbdist.telemetry.host import host_id

__all__ = ["EngineShells", "RunningCluster", "connection_file"]

_ANSWERED_WITHIN_S = 30.0
_LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class EngineShells(AgentLauncher):
    """See `AgentLauncher`.

    Args:
        file: The cluster's connection file.
        engines: The ids of its engines on each host.
        pythons: Their Python on each host.
        addresses: The address of each host.
    """

    file: str
    engines: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pythons: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)

    def command_on(self, host: str, line: str) -> list[str]:
        """See `AgentLauncher`."""
        engines = ",".join(map(str, self.engines[host]))
        program = f"from {engine_shell.__name__} import main; main()"  # with -m its functions would be of __main__
        return [sys.executable, "-c", program, self.file, host, engines, line]

    def python_on(self, host: str) -> str:
        """See `AgentLauncher`: that of the engines there."""
        return self.pythons[host]

    def real_name(self, host: str) -> str:
        """See `AgentLauncher`."""
        return self.addresses[host] or host


class RunningCluster(Allocation):
    """See `Allocation`; the number of engines is by default that of the cluster's own on each host."""

    @classmethod
    def connect(
        cls, file: str, chosen: Mapping[str, int | None], report: Callable[[str], None] = lambda words: None
    ) -> RunningCluster:
        """Find the hosts of a cluster.

        Args:
            file: Its connection file.
            chosen: The hosts that are used, with the number of engines on each; all if there are none.
            report: Progress callback: is told while engines are busy.

        Raises:
            PlanError: A host is not among its own.
            ClusterError: It does not answer, has no engines, or they have no nbdist.
        """
        found = _describe(file, report)
        names: dict[str, str] = {}  # of each host, by its id
        for about in found.values():
            names.setdefault(about["host_id"], LOCAL if about["host_id"] == host_id() else about["name"])
        hosts = sorted(names, key=lambda each: names[each] != LOCAL)
        engines = {
            names[host]: tuple(engine for engine, about in found.items() if about["host_id"] == host) for host in hosts
        }
        for name in chosen:
            if name not in engines:
                raise PlanError(f"host {name} is none of the cluster's: {', '.join(engines)}.{suggest(name, engines)}")
        first = {name: found[ids[0]] for name, ids in engines.items()}
        launcher = EngineShells(
            file=file, engines=engines, pythons={name: about["python"] for name, about in first.items()},
            addresses={name: about["address"] for name, about in first.items()},
        )  # fmt: skip
        own = {name: len(ids) for name, ids in engines.items()}
        return cls({name: count or own[name] for name, count in chosen.items()} or own, launcher)

    def end(self) -> None:
        """See `Allocation`: nothing was."""


def connection_file(connect: str | None, profile: str | None) -> str:
    """The connection file of a running cluster.

    Args:
        connect: That file, or the one that describes the cluster (``cluster-ID.json``).
        profile: Or the name of its IPython profile.

    Raises:
        PlanError: There is none, or the profile has several.
    """
    if profile is not None:
        return _of_profile(profile)
    path = Path(connect or "").expanduser()
    try:
        about = json.loads(path.read_text())
        if "registration" not in about:
            path = _client_file(about["cluster"])
            about = json.loads(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{connect!r} is no connection file of a running ipyparallel cluster ({type(error).__name__}: {error}): "
            "name its ipcontroller-client.json."
        ) from None
    return str(path.resolve())


def _client_file(cluster: Mapping[str, Any]) -> Path:
    """The connection file for clients, of a cluster that its own file describes."""
    number = f"-{cluster['cluster_id']}" if cluster["cluster_id"] else ""
    return Path(cluster["profile_dir"]) / "security" / f"ipcontroller{number}-client.json"


def _of_profile(profile: str) -> str:
    from IPython.core.profiledir import ProfileDir, ProfileDirError
    from IPython.paths import get_ipython_dir

    try:
        folder = Path(ProfileDir.find_profile_dir_by_name(get_ipython_dir(), profile).location) / "security"
    except ProfileDirError as error:
        raise PlanError(f"there is no IPython profile {profile!r}: {error}") from None
    files = sorted(folder.glob("ipcontroller*-client.json"))
    if not files:
        raise PlanError(f"no ipyparallel cluster runs in profile {profile!r}: start one, as with ipcluster start.")
    if len(files) > 1:
        listed = ", ".join(str(file) for file in files)
        raise PlanError(f"profile {profile!r} has {len(files)} ipyparallel clusters: --connect one of {listed}.")
    return str(files[0].resolve())


def _describe(file: str, report: Callable[[str], None]) -> dict[int, dict[str, str]]:
    """What each engine of a cluster says of its host."""
    import ipyparallel

    try:
        client = ipyparallel.Client(file, timeout=_ANSWERED_WITHIN_S)
    except (TimeoutError, OSError) as error:
        raise ClusterError(f"the ipyparallel cluster of {file} does not answer ({error}).") from None
    try:
        if not client.ids:
            raise ClusterError(f"the ipyparallel cluster of {file} has no engines: start some on each host.")
        address = _controller_address(json.loads(Path(file).read_text()))
        calls = {engine: client[engine].apply_async(engine_shell.describe, address) for engine in client.ids}
        while busy := [engine for engine, call in calls.items() if not call.ready()]:
            report(f"waiting for busy engines of the ipyparallel cluster: {', '.join(map(str, busy))}")
            calls[busy[0]].wait(_LOOK_S)
        return {engine: _answer(engine, call) for engine, call in calls.items()}
    finally:
        client.close()


def _answer(engine: int, call: Any) -> dict[str, str]:
    try:
        about: dict[str, str] = call.get()
    except Exception as error:
        raise ClusterError(
            f"engine {engine} of the ipyparallel cluster cannot start an agent ({error}): install this nbdist for its "
            "Python too."
        ) from None
    return about


def _controller_address(connection: Mapping[str, Any]) -> str:
    """Where the controller is, as its connection file says: where it listens, or the name of its host."""
    listens = str(connection.get("interface", "")).rpartition("/")[2]
    everywhere = listens in ("", "*", "0.0.0.0") or listens.startswith("127.")
    return str(connection.get("location", "")) if everywhere else listens
