"""Client of the anchor: the process that owns a detached cluster instead of the kernel, so that it outlives it.

This is the kernel's side; the anchor is in `anchor_server`.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import math
import os
import pickle
import secrets
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nbdist.errors import ClusterError, PlanError, suggest
from nbdist.peer_auth import same_user
from nbdist.process_mark import alive, process_mark
from nbdist.telemetry.host import host_id, host_name
from nbdist.telemetry.record import records

__all__ = ["PROXY", "Anchor", "Detached", "check_detach", "detached_clusters"]

_SOCKET = "anchor"
PROXY = "agents"
"""The socket, in the cluster's folder, at which the anchor has the agents of other hosts."""


@dataclass(frozen=True, kw_only=True)
class Detached:
    """A running detached cluster.

    Args:
        name: The name to attach with.
        engines: Its number of ranks; 0 while it starts.
        owner: The pid of the kernel that owns it; 0 for none.
        left_s: How long it still waits for a kernel, in seconds.
        run_id: Its current or last run; empty without one.
        run_state: "running", or how it ended.
    """

    name: str
    engines: int
    owner: int
    left_s: float
    run_id: str
    run_state: str


class Anchor:
    """A connection to an anchor. Local to the process that created it; thread-safe.

    Args:
        name: The cluster's.
        folder: The cluster's.
        mark: The anchor's process, see `process_mark`.
        patience_s: How long it waits for a kernel, in seconds.
    """

    def __init__(self, name: str, folder: str, mark: str, patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self.folder = folder
        self.mark = mark
        self._lock = threading.Lock()
        self._requests = 0
        self._to_release: collections.deque[str] = collections.deque()
        address = socket.socket(socket.AF_UNIX)
        try:
            address.connect(os.path.join(folder, _SOCKET))
            if not same_user(address):
                raise PermissionError
        except OSError:
            address.close()
            raise ClusterError(f"the anchor of cluster {name} has ended, and the cluster with it.") from None
        self._pipe = Connection(address.detach())

    @classmethod
    def start(cls, folder: str, patience_s: float, address: str = "") -> Anchor:
        """Start an anchor that this process owns.

        Args:
            folder: The cluster's; removed when the anchor ends.
            patience_s: How long the cluster lives while no kernel owns it, in seconds.
            address: Of this host, where the cluster's other hosts reach it; empty if there are none.
        """
        _entries().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _entries().mkdir(exist_ok=True, mode=0o700)
        while (entry := _entries() / f"{(name := secrets.token_hex(2))}.json").exists():
            pass  # taken, for example on another host
        with socket.socket(socket.AF_UNIX) as listener, open(os.path.join(folder, "anchor.log"), "wb") as log:
            listener.bind(os.path.join(folder, _SOCKET))
            listener.listen()
            started = subprocess.Popen(
                [sys.executable, "-m", "nbdist.cluster.launch.anchor_server", str(listener.fileno()), folder,
                 str(entry), str(patience_s), address, os.path.join(folder, PROXY)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                pass_fds=[listener.fileno()], start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=started.wait, daemon=True, name="nbdist-anchor").start()  # no zombie
        mark = process_mark(started.pid)
        facts = {"folder": folder, "mark": mark, "patience_s": patience_s}
        entry.write_text(json.dumps({**facts, "host": host_name(), "host_id": host_id()}))
        anchor = cls(name, folder, mark, patience_s)
        anchor._own()
        return anchor

    @classmethod
    def reach(cls, name: str | None = None) -> Anchor:
        """Connect to the anchor of a cluster without an owner, and own it.

        Args:
            name: The cluster's; not needed if there is only one.

        Raises:
            PlanError: There is none, or several.
            ClusterError: Another kernel owns it.
        """
        entries, elsewhere = _living()
        if name in elsewhere:
            raise PlanError(f"cluster {name} was started {elsewhere[name]}: attach to it there.")
        names = list(entries)
        if not names:
            raise PlanError("no detached cluster lives: %dist_start --detach starts one.")
        if name is None and len(names) > 1:
            raise PlanError(f"{len(names)} detached clusters live: name one of {', '.join(names)}.")
        if name is not None and name not in names:
            raise PlanError(f"no detached cluster {name!r} lives: %dist_clusters lists them.{suggest(name, names)}")
        anchor = cls(name or names[0], **entries[name or names[0]])
        anchor._own()
        return anchor

    def _own(self) -> None:
        this_process = process_mark(os.getpid())
        owner = self._call("own", this_process)
        if owner != this_process:
            self.leave()
            raise ClusterError(
                f"cluster {self.name} belongs to the kernel with process {owner.partition(':')[0]}: use it there, or "
                "end that kernel first."
            )
        atexit.register(self.leave)

    def state(self) -> dict[str, Any]:
        """The anchor's state: `owner`, `left_s`, the `store`'s address, and the `notes`.

        Raises:
            ClusterError: The anchor has ended, or its notes are of another version.
        """
        state: dict[str, Any] = self._call("state")
        try:
            return {**state, "notes": {name: pickle.loads(value) for name, value in state["notes"].items()}}
        except (AttributeError, ImportError) as error:
            raise ClusterError(
                f"cluster {self.name} was started by another version of nbdist: attach to it with that one ({error})."
            ) from error

    def note(self, name: str, value: Any) -> None:
        """Save a value for the next kernel under a name; replaces an earlier one."""
        self._call("note", name, pickle.dumps(value))

    def hold(self) -> str:
        """Create shared memory that the anchor holds; returns the path."""
        return str(self._call("hold"))

    def release(self, path: str) -> None:
        """Free the memory at `path`; does nothing after `leave`."""
        self.release_later(path)
        with contextlib.suppress(ClusterError):
            self._release_pending()

    def release_later(self, path: str) -> None:
        """`release` with the next request: for finalizers, which may run in the middle of one."""
        self._to_release.append(path)

    def leave(self) -> None:
        """Disconnect: the cluster waits for another kernel. Twice is fine."""
        self._pipe.close()
        atexit.unregister(self.leave)

    def end(self) -> None:
        """End the anchor and the remaining processes of the cluster. Twice is fine."""
        with contextlib.suppress(ClusterError):
            self._call("end")
        self.leave()

    def _call(self, *request: Any) -> Any:
        self._release_pending()
        with self._lock:
            return self._exchange(*request)

    def _release_pending(self) -> None:
        with self._lock:
            while self._to_release:
                self._exchange("release", self._to_release.popleft())

    def _exchange(self, *request: Any) -> Any:
        try:
            self._requests += 1
            self._pipe.send((self._requests, *request))
            while True:
                number, reply = self._pipe.recv()
                if number == self._requests:  # else the reply to a request whose wait was interrupted
                    return reply
        except (EOFError, OSError):
            raise ClusterError(f"the anchor of cluster {self.name} has ended, and the cluster with it.") from None


def detached_clusters() -> list[Detached]:
    """The running detached clusters of this user on this host. Local."""
    found = []
    for name, entry in _living()[0].items():
        with contextlib.suppress(ClusterError):
            anchor = Anchor(name, **entry)
            state = anchor.state()
            anchor.leave()
            notes = state["notes"]
            run = notes.get("run")
            found.append(
                Detached(
                    name=name, engines=notes.get("engines", {}).get("size", 0),
                    owner=int(state["owner"].partition(":")[0] or 0), left_s=state["left_s"],
                    run_id="" if run is None else run.spec.run_id, run_state="" if run is None else notes["ended"][0],
                )
            )  # fmt: skip
    return found


def check_detach(patience_s: float) -> None:
    """Raise `PlanError` if engines cannot run without a kernel for so many seconds."""
    if sys.platform != "linux":
        raise PlanError("engines can outlive the kernel on Linux only: omit --detach.")
    number = isinstance(patience_s, (int, float)) and not isinstance(patience_s, bool)
    if not (number and 0 < patience_s < math.inf):
        raise PlanError(f"engines cannot wait {patience_s!r} s for a kernel: use a number of seconds, more than 0.")


def _entries() -> Path:
    return records().parent / "clusters"


def _living() -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Folder, mark and patience of each running anchor of this host, by name; and where the others are.

    Entries of dead anchors are removed, but only of this host, whose processes can be checked. Anchors from before its
    last boot are dead.
    """
    living, elsewhere = {}, {}
    for path in sorted(_entries().glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # it has just ended, or is just starting
            entry = json.loads(path.read_text())
            host, its_id = entry.pop("host", host_name()), entry.pop("host_id", host_id())
            same_boot = its_id.partition("/")[0] == host_id().partition("/")[0]
            if host != host_name():
                elsewhere[path.stem] = f"on host {host}"
            elif its_id != host_id() and same_boot:
                elsewhere[path.stem] = f"in another container on {host}"
            elif its_id == host_id() and alive(entry["mark"]):
                living[path.stem] = entry
            else:
                path.unlink()
    return living, elsewhere
