"""The notice that hosts of engines are taken away soon: by a time limit, or with SIGTERM, as Slurm does."""

from __future__ import annotations

import threading

from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.cluster.launch.launcher import Launch

__all__ = ["EndNotice"]


class EndNotice:
    """Hosts that are terminated while a run is trained stay until it has saved; others end at once.

    Args:
        launch: Of the engines.
    """

    def __init__(self, launch: Launch) -> None:
        self._allocation = launch.allocation
        self._lock = threading.Lock()
        self._held = False
        self._terminated: list[RemoteHost] = []
        launch.on_terminated = self._note

    @property
    def text(self) -> str:
        """Which hosts end soon, and why, as a clause; empty if there is none."""
        if names := [host.name for host in self._terminated]:
            return f"host {', '.join(names)} got SIGTERM, as before the end of its job"
        return "" if self._allocation is None else self._allocation.ending

    def hold(self) -> None:
        """A run is trained: hosts stay, until `let_go` or `release`."""
        self._hold(True)

    def let_go(self) -> None:
        """What was to be saved before hosts end is: those that are terminated may."""
        with self._lock:
            terminated, self._terminated = self._terminated, []
        for host in terminated:
            host.hang_up()

    def release(self) -> None:
        """The run has ended. Twice is fine."""
        self._hold(False)
        self.let_go()

    def _hold(self, held: bool) -> None:
        with self._lock:
            self._held = held
        if self._allocation is not None:
            self._allocation.held = held

    def _note(self, host: RemoteHost) -> None:
        with self._lock:
            held = self._held
            if held:
                self._terminated.append(host)
        if not held:
            host.hang_up()
