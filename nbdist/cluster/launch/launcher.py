"""Launch: a controller, the hosts that run engines for it, and the client that reaches them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipyparallel
import psutil
from traitlets.config import Config

from nbdist.cluster.calls.engine_client import EngineClient
from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.host import ALL_LOST, EngineEnvironment, Host, HostFacts
from nbdist.cluster.hosts.host_choice import CONTROLLER_PORTS, LOCAL, HostChoice
from nbdist.cluster.hosts.local_host import GUARD, LocalHost, interface_to, kill_tree
from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.cluster.launch.agent_launchers import allocation_of, way_to_hosts
from nbdist.cluster.launch.anchor_client import PROXY, Anchor
from nbdist.cluster.launch.forked_controller import ForkedController
from nbdist.cluster.launch.ipyparallel_client import IpyparallelClient
from nbdist.cluster.launch.other_hosts import OtherHosts
from nbdist.cluster.launch.reserved_ports import ReservedPorts
from nbdist.engine.parent_watch import FOLDER_VARIABLE, OWNER_VARIABLE
from nbdist.errors import ClusterError, PlanError
from nbdist.listening import use_ports
from nbdist.plan import available_cores, check_engines, default_engines
from nbdist.process_mark import has_ended, process_mark
from nbdist.telemetry.host import host_id, host_name

__all__ = ["CONTROLLER_ENDED", "STORE_ENDED", "Launch"]

_ANEW = "so the engines cannot be reached: %dist_start starts new ones; the memory of the old ones is lost."
CONTROLLER_ENDED = f"the controller's process has ended, {_ANEW}"
STORE_ENDED = f"the process of the ranks' store has ended, {_ANEW}"

_PING_MS = 100  # a registration completes at the next heartbeat: with the default, after up to 3 s
_MISSED_BEATS = 100  # a swapped-out engine misses more than the default of 10 such short beats
_POLL_S = 0.01
_MISSED_AFTER_S = 1.0


class Launch:
    """A controller and its engines as processes, on one or several hosts, with a client connected to them.

    Args:
        choice: How many engines to start on which hosts, see `wait_for`; a number of them on this one.
        patience_s: How long they live without a kernel, in seconds; None if they end with this one.
        timeout_s: How long other hosts may take to answer first, in seconds.
        report: Progress callback: is told while hosts are waited for.

    Attributes:
        hosts: The hosts, by name, in the user's order.
        allocation: What they are of; None where they were named.
        size: How many engines were started first.
        address: Of this host, where the others reach it; empty if there are none.
        interface: The network interface that has it.
        on_lost: Called with the id of a host that is lost, in a thread.
        on_back: Called once a lost host can be used again, in a thread.
        on_terminated: Called with a host that has to be left, in a thread; see `RemoteHost.begin`.

    Raises:
        PlanError: A host cannot be found, or cannot run so many engines.
        ClusterError: A host cannot be reached, or has another environment; or none is allocated. Then nothing is left
            running.
    """

    _local: LocalHost

    def __init__(
        self, choice: HostChoice | int, patience_s: float | None = None, timeout_s: float = 60.0,
        report: Callable[[str], None] = lambda words: None,
    ) -> None:  # fmt: skip
        choice = HostChoice(engines={LOCAL: choice}) if isinstance(choice, int) else choice
        self.allocation = allocation_of(choice, report)
        try:
            self._begin(choice, patience_s, timeout_s)
        except BaseException:
            if self.allocation is not None:
                self.allocation.end()
            raise

    def _begin(self, choice: HostChoice, patience_s: float | None, timeout_s: float) -> None:
        if (allocation := self.allocation) is not None:
            choice = replace(choice, engines=allocation.engines(choice.total))
        counts, launcher, address, own_ports = choice.engines, None, "", range(0)
        if choice.others:
            launcher, own_ports = way_to_hosts(choice, allocation)
            address = launcher.address_towards(choice.others, choice.interface)
        use_ports(own_ports[CONTROLLER_PORTS:])
        ports = ReservedPorts(own_ports[:CONTROLLER_PORTS] or [0] * CONTROLLER_PORTS)
        folder = Path(tempfile.mkdtemp(prefix="nbdist-"))
        self._prepare(folder, None if patience_s is None else Anchor.start(str(folder), patience_s, address), address)
        self._ports = ports
        self._cluster = ipyparallel.Cluster(
            controller=ForkedController,
            log_level=40,
            cluster_id="",
            cluster_file="",  # other ipyparallel clients must not find this cluster
            profile_dir=str(folder / "profile"),
            config=self._settings(engines_follow=LOCAL in counts),
            load_profile=False,
            shutdown_atexit=False,  # `Cluster` in cluster.py does it, in the right order
            controller_args=[
                f"--ping={_PING_MS}", "--usethreads", f"--HeartMonitor.max_heartmonitor_misses={_MISSED_BEATS}",
                *([f"--ip={address}"] if address else []),
                *([f"--ports={','.join(map(str, numbers))}"] if (numbers := self._ports.numbers) else []),
            ],
        )  # fmt: skip
        self.client: EngineClient = IpyparallelClient(self._cluster.connect_client_sync)
        try:
            if launcher is not None:
                self._use(OtherHosts(launcher, address, timeout_s, self._proxy))
            for name in counts:
                self.hosts[name] = self._local if self._others is None or name == LOCAL else self._others.add(name)
            if choice.others:
                self._sign_messages()
            self._cluster.start_controller_sync()
            self.size = self._start_first(choice)
            self.client.connect()
            self._note()
        except BaseException:
            self.end()
            raise

    def _prepare(self, folder: Path, anchor: Anchor | None, address: str) -> None:
        """What a new launch and an attached one begin with."""
        self.folder, self.anchor, self.address, self.size = folder, anchor, address, 0
        if fork_client.can_fork():
            fork_client.require_server()  # it loads torch from now on
        self.host_id = host_id()
        self._owner = process_mark(os.getpid()) if anchor is None else anchor.mark
        self.interface = interface_to(address)[0] if address else ""
        facts = HostFacts(
            name=host_name(), host_id=self.host_id, cores=available_cores(), address=address, interface=self.interface
        )
        self._local = LocalHost(facts, folder, self._owner)
        self._ports = ReservedPorts([])
        self.hosts: dict[str, Host] = {}
        self._found: dict[str, Host] = {}  # by id: each state of each engine asks for its host
        self._others: OtherHosts | None = None
        self._homes: list[str] = []  # on which host each rank was started first
        self.on_lost: Callable[[str], None] = lambda host_id: None
        self.on_back: Callable[[], None] = lambda: None
        self.on_terminated: Callable[[RemoteHost], None] = lambda host: host.hang_up()
        self._newest: list[tuple[Host, concurrent.futures.Future[list[str]]]] = []

    @classmethod
    def attach(cls, anchor: Anchor, notes: dict[str, Any]) -> Launch:
        """Attach to the processes that another kernel started.

        Args:
            anchor: Their owner.
            notes: Of that kernel.
        """
        launch, hosts = cls.__new__(cls), notes["hosts"]
        launch.allocation = None
        launch._prepare(Path(anchor.folder), anchor, hosts["address"])
        launch._cluster = ipyparallel.Cluster.from_dict(
            notes["launched"], config=launch._settings(), load_profile=False, shutdown_atexit=False, log_level=50
        )
        launch._local.adopt(set(notes["processes"]) - set(launch._controller_marks()))
        launch._homes = hosts["homes"]
        if hosts["others"] is not None:
            launch._use(OtherHosts.attach(hosts["others"], launch._proxy))
        others = {} if launch._others is None else launch._others.newest
        launch.hosts.update({name: others.get(name, launch._local) for name in hosts["names"]})
        launch.client = IpyparallelClient(launch._cluster.connect_client_sync)
        launch.client.connect()
        while launch.client.look_again():  # engines may die at this very moment
            pass
        return launch

    def _note(self) -> None:
        """Save the processes at the anchor, for the next kernel."""
        if self.anchor is not None:
            self.anchor.note("processes", [*self._controller_marks(), *sorted(self._local.processes())])
            self.anchor.note("launched", self._cluster.to_dict())
            others = None if self._others is None else self._others.note()
            names = {"names": list(self.hosts), "homes": self._homes}
            self.anchor.note("hosts", {**names, "address": self.address, "others": others})

    @property
    def _proxy(self) -> str:
        return "" if self.anchor is None else str(self.folder / PROXY)

    def _use(self, others: OtherHosts) -> None:
        self._others = others
        others.on_lost, others.on_back = lambda host_id: self.on_lost(host_id), self._rejoin
        others.on_terminated = lambda host: self.on_terminated(host)

    def _rejoin(self, host: Host) -> None:
        self.hosts[host.name] = host
        self._found = {}  # another dict: a thread may be about to write into this one
        self._note()
        self.on_back()

    def _settings(self, *, engines_follow: bool = True) -> Config:
        environment = {OWNER_VARIABLE: self._owner, FOLDER_VARIABLE: str(self.folder)}
        if self.address:
            environment["IPP_ENABLE_CURVE"] = "1"  # what goes over a network is encrypted
        config = Config()
        config.BaseLauncher.output_limit = 0  # else a stop prints a hundred lines of log
        config.BaseLauncher.environment = environment
        config.LocalProcessLauncher.stop_seconds_until_kill = 1
        config.ControllerLauncher.controller_cmd = [*GUARD, "controller"]
        config.ForkedController.engines_follow = engines_follow
        return config

    def _sign_messages(self) -> None:
        """Let the controller authenticate what it receives: with encryption it would not, unless it is given a key."""
        profile = self.folder / "profile"
        profile.mkdir(exist_ok=True)
        (profile / "ipcontroller_config.py").write_text(f'get_config().Session.key = b"{secrets.token_hex(32)}"\n')

    def _start_first(self, choice: HostChoice) -> int:
        """Start the first engines, on all hosts at once; returns how many."""
        total, starting, names = 0, [], dict[str, str]()
        for name, count in choice.engines.items():
            facts = self.hosts[name].facts
            if (other := names.setdefault(facts.host_id, name)) != name:
                raise PlanError(f"{other} and {name} are the same host: name it once, with all its engines.")
            gpus = 0 if choice.device == "cpu" else facts.gpus
            if choice.tunnel and gpus and choice.others:
                raise PlanError("GPUs of several hosts are joined by NCCL, which no tunnel carries: --device cpu.")
            chosen = default_engines(facts.cores, gpus) if count is None else count
            if name != LOCAL:
                check_engines(chosen, facts.cores, gpus, f"host {name}")
            starting.append((self.hosts[name], chosen))
            self._homes += [name] * chosen
            total += chosen
        self._newest = [(host, host.start_engines(chosen, self._environment)) for host, chosen in starting]
        return total

    @functools.cached_property
    def _environment(self) -> EngineEnvironment:
        """How engines reach the controller, once it has written that."""
        file = Path(self._cluster.controller.connection_files["engine"])
        while self.controller_runs:
            with contextlib.suppress(OSError, ValueError):  # not there yet, or not all of it
                return {"IPP_CONNECTION_INFO": json.dumps(json.loads(file.read_text())), "IPP_CLUSTER_ID": ""}
            time.sleep(_POLL_S)
        raise ClusterError(CONTROLLER_ENDED)

    def home(self, rank: int) -> str:
        """The id of the host on which a rank was started first; empty if there is none, or it is lost."""
        host = self.hosts[self._homes[rank]] if rank < len(self._homes) else None
        return "" if host is None or host.lost else host.facts.host_id

    def at_home(self, rank: int, host_id: str) -> bool:
        """Whether a rank is where it was started first, or cannot be there."""
        return self.home(rank) in ("", host_id)

    def wait_for(self, engines: int, timeout_s: float, report: Callable[[str], None]) -> None:
        """Wait until `engines` are registered; reports how many are.

        Raises:
            ClusterError: An engine that was just started has ended, a host is lost, or the timeout passed.
        """
        deadline = time.monotonic() + timeout_s
        look_again_s = time.monotonic() + _MISSED_AFTER_S
        while (ready := len(self.client.ids)) < engines:
            report(f"{ready} of {engines} engines are ready")
            if not self.controller_runs:
                raise ClusterError(CONTROLLER_ENDED)
            self._check_newest()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"only {ready} of {engines} engines were ready after {timeout_s:g} s: "
                    f"raise --timeout, or start fewer."
                )
            if time.monotonic() > look_again_s:
                self.client.look_again()
                look_again_s = time.monotonic() + _MISSED_AFTER_S
            time.sleep(_POLL_S)

    def _check_newest(self) -> None:
        """Raise `ClusterError` if an engine that was started last could not start, or has ended."""
        for host, started in self._newest:
            if started.done() and not all(map(host.runs, started.result())):
                raise ClusterError(f"an engine ended while it started:\n{host.log_tail()}")

    def processes(self) -> set[tuple[str, str]]:
        """The running engine processes, registered or not: host id and mark of each."""
        return {(host.facts.host_id, mark) for host in self.living() for mark in host.processes()}

    def living(self) -> list[Host]:
        """The hosts that are not lost."""
        return [host for host in self.hosts.values() if not host.lost]

    def host_of(self, host_id: str) -> Host | None:
        """The host with this id; None for one that is not of this launch."""
        found = self._found
        if host_id not in found:
            host = next((host for host in self.hosts.values() if host.facts.host_id == host_id), None)
            if host is None:
                return None
            found[host_id] = host
        return found[host_id]

    def check_size(self, engines: int, own_gpus: int) -> None:
        """Raise `PlanError` if the hosts that are left cannot run so many engines; with the GPUs of the kernel's."""
        hosts, own = self.living(), own_gpus if LOCAL in self.hosts else 0
        cores, gpus = sum(host.facts.cores for host in hosts), sum(host.facts.gpus for host in hosts) + own
        check_engines(engines, cores, gpus, "this machine" if len(hosts) == 1 else f"the {len(hosts)} hosts")

    def runs(self, host_id: str, mark: str) -> bool:
        """Whether an engine's process has not ended, as far as is known. Returns at once."""
        host = self.host_of(host_id)
        return host is None or host.runs(mark)

    def add(self, count: int, preferred: Iterable[str] = ()) -> set[tuple[str, str]]:
        """Start `count` more engines; returns host id and mark of each. They register later, under new ids.

        Args:
            count: How many.
            preferred: Ids of the hosts that they should be on; where one is lost, and for more engines than that, the
                host with the fewest engines for its cores is taken.

        Raises:
            ClusterError: No host is left, or they could not be started.
        """
        living = self.living()
        if not living:
            raise ClusterError(ALL_LOST)
        chosen: list[Host] = []
        for wanted in [*preferred, *[""] * count][:count]:
            same = [host for host in living if host.facts.host_id == wanted]
            load = {
                host.name: (len(host.processes()) + chosen.count(host) + 1) / host.facts.cores
                for host in same or living
            }  # fmt: skip
            chosen.append(min(same or living, key=lambda host: load[host.name]))
        self._newest = [
            (host, host.start_engines(chosen.count(host), self._environment)) for host in dict.fromkeys(chosen)
        ]
        added = {(host.facts.host_id, mark) for host, started in self._newest for mark in started.result()}
        self._note()
        return added

    @property
    def controller_runs(self) -> bool:
        """Whether the controller's process runs."""
        process = getattr(self._cluster.controller, "process", None)
        return process is None or not has_ended(process)

    def _controller_marks(self) -> list[str]:
        """The mark of the controller's process; empty if it has ended."""
        process = getattr(self._cluster.controller, "process", None)
        with contextlib.suppress(psutil.NoSuchProcess):
            return [process_mark(process.pid)] if process is not None else []
        return []

    def end(self) -> None:
        """End every process, on all hosts. Twice is fine. What engines run is not waited for."""
        if self._others is not None:
            self._others.begin_end()
        self._local.begin_end()
        if (controller := getattr(self._cluster.controller, "process", None)) is not None:
            kill_tree(controller)
        self.client.close()
        self._ports.close()
        # Orphans of a killed fork server may stay zombies, for which ipyparallel would wait a minute.
        if self.folder.exists() and all(server.alive for server in fork_client.servers_of(str(self.folder))):
            with contextlib.suppress(Exception):  # the processes have ended, whatever ipyparallel raises
                self._cluster.stop_cluster_sync()
        if self._others is not None:
            self._others.end()
        self._local.end()
        if self.anchor is not None:
            self.anchor.end()
        if self.allocation is not None:
            self.allocation.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log_tail(self) -> str:
        """The end of each engine's log."""
        return "\n".join(host.log_tail() for host in self.living())
