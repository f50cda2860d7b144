"""A cluster of ipyparallel that the user has started: its controller on this host, engines on others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ipyparallel
from host_network import NETWORK, HostNetwork
from shared_cluster import until


class UsersCluster:
    """Between `up` and `down`.

    Args:
        network: The hosts.
        folder: Its profile's; all hosts see it.
        hosts: On which its engines are.
        each: How many on each.
    """

    def __init__(self, network: HostNetwork, folder: Path, hosts: Sequence[str], each: int) -> None:
        self.file = folder / "security" / "ipcontroller-client.json"
        self._network, self._folder, self._hosts, self._each = network, folder, list(hosts), each
        self._controller: subprocess.Popen[bytes] | None = None
        self.client: ipyparallel.Client | None = None

    def up(self) -> None:
        """Start it; all engines have registered when this returns."""
        self._controller = subprocess.Popen(
            [sys.executable, "-m", "ipyparallel.controller", f"--ip={NETWORK}.1", "--ping=200",
             f"--profile-dir={self._folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(lambda: self.file.exists())
        self.client = ipyparallel.Client(str(self.file))
        self.start_engines()

    def start_engines(self) -> None:
        """Start those that have ended, as on a host that has crashed."""
        file = self.file.with_name("ipcontroller-engine.json")
        for name in self._hosts:
            running = int(
                self._network.run(name, f"pgrep -c -f '^[^ ]*python[^ ]* -m ipyparallel.engine --file={file}'")
            )
            for _ in range(self._each - running):
                line = f"cd {self._folder} && exec {sys.executable} -m ipyparallel.engine --file={file}"
                command = ["ssh", "-f", "-o", "ServerAliveInterval=1", name, f"{line} > /dev/null 2>&1"]
                subprocess.run(command, check=True)
        until(lambda: self._each * len(self._hosts) == len(self.client.ids))

    def down(self) -> None:
        """End it."""
        if self.client is not None:
            self.client.shutdown(hub=True, block=False)
            self.client.close()
        if self._controller is not None:
            self._controller.terminate()
            self._controller.wait()
