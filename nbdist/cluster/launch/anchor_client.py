"""The anchor: a process to which a detached cluster is tied in place of the kernel, so that it outlives that.

This is the kernel's side; what the anchor itself runs is in `anchor_server`.
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

from nbdist.engine import parent_watch
from nbdist.errors import ClusterError, PlanError, suggest
from nbdist.peer_auth import same_user
from nbdist.telemetry.host import host_id, host_name
from nbdist.telemetry.record import records

__all__ = ["Anchor", "Detached", "check_detach", "detached_clusters"]

_SOCKET = "anchor"


@dataclass(frozen=True, kw_only=True)
class Detached:
    """A cluster that was started to outlive its kernel, and lives.

    Args:
        name: By which it is attached to.
        engines: How many ranks it has; 0 while it starts.
        owner: The process of the kernel that it belongs to; 0 for none.
        left_s: How long it waits for one, in seconds.
        run_id: The run that it works on, or has worked on; empty without one.
        run_state: "running", or how it ended.
    """

    name: str
    engines: int
    owner: int
    left_s: float
    run_id: str
    run_state: str


class Anchor:
    """A connection to an anchor. Local to the process that made it; safe to use from several threads.

    Args:
        name: The cluster's.
        folder: The cluster's.
        mark: The anchor's process, see `owner_guard`.
        patience_s: How long it waits for a kernel.
    """

    def __init__(self, name: str, folder: str, mark: str, patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self.folder = folder
        self.mark = mark
        self._one_at_a_time = threading.Lock()
        self._asked = 0
        self._unneeded: collections.deque[str] = collections.deque()
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
    def start(cls, folder: str, patience_s: float) -> Anchor:
        """Start an anchor that this process owns.

        Args:
            folder: The cluster's, which ends with it.
            patience_s: How long the cluster lives when no kernel owns it.
        """
        _entries().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _entries().mkdir(exist_ok=True, mode=0o700)
        while (entry := _entries() / f"{(name := secrets.token_hex(2))}.json").exists():
            pass  # another host's, say
        with socket.socket(socket.AF_UNIX) as listener, open(os.path.join(folder, "anchor.log"), "wb") as log:
            listener.bind(os.path.join(folder, _SOCKET))
            listener.listen()
            started = subprocess.Popen(
                [sys.executable, "-m", "nbdist.cluster.launch.anchor_server", str(listener.fileno()), folder,
                 str(entry), str(patience_s)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                pass_fds=[listener.fileno()], start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=started.wait, daemon=True, name="nbdist-anchor").start()  # no zombie
        mark = parent_watch.owner_mark(started.pid)
        told = {"folder": folder, "mark": mark, "patience_s": patience_s}
        entry.write_text(json.dumps({**told, "host": host_name(), "host_id": host_id()}))
        anchor = cls(name, folder, mark, patience_s)
        anchor._own()
        return anchor

    @classmethod
    def reach(cls, name: str | None = None) -> Anchor:
        """The anchor of a cluster that nobody owns, which this process owns from now on.

        Args:
            name: Which; not needed where there is only one.

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
        mine = parent_watch.owner_mark(os.getpid())
        owner = self._ask("own", mine)
        if owner != mine:
            self.leave()
            raise ClusterError(
                f"cluster {self.name} belongs to the kernel with process {owner.partition(':')[0]}: use it there, or "
                "end that kernel first."
            )
        atexit.register(self.leave)

    def look(self) -> dict[str, Any]:
        """What it knows: `owner`, `left_s`, the `store`'s address, and the `notes`."""
        told: dict[str, Any] = self._ask("look")
        return {**told, "notes": {name: pickle.loads(value) for name, value in told["notes"].items()}}

    def note(self, name: str, value: Any) -> None:
        """Leave something that another kernel has to know, in place of what has this name."""
        self._ask("note", name, pickle.dumps(value))

    def hold(self) -> str:
        """Let it make shared memory and hold it; returns the path."""
        return str(self._ask("hold"))

    def is_released(self, path: str) -> None:
        """The memory is not needed any more; nothing happens once this kernel has left."""
        self.let_go_later(path)
        with contextlib.suppress(ClusterError):
            self._let_go_of_unneeded()

    def let_go_later(self, path: str) -> None:
        """`is_released` with whatever is said next: for finalizers, which may run in the middle of an exchange."""
        self._unneeded.append(path)

    def leave(self) -> None:
        """Give the cluster up: it waits for another kernel. Twice is fine."""
        self._pipe.close()
        atexit.unregister(self.leave)

    def end(self) -> None:
        """End the anchor, and with it what is left of the cluster. Twice is fine."""
        with contextlib.suppress(ClusterError):
            self._ask("end")
        self.leave()

    def _ask(self, *words: Any) -> Any:
        self._let_go_of_unneeded()
        with self._one_at_a_time:
            return self._exchange(*words)

    def _let_go_of_unneeded(self) -> None:
        with self._one_at_a_time:
            while self._unneeded:
                self._exchange("is_released", self._unneeded.popleft())

    def _exchange(self, *words: Any) -> Any:
        try:
            self._asked += 1
            self._pipe.send((self._asked, *words))
            while True:
                number, answer = self._pipe.recv()
                if number == self._asked:  # not one whose wait was interrupted
                    return answer
        except (EOFError, OSError):
            raise ClusterError(f"the anchor of cluster {self.name} has ended, and the cluster with it.") from None


def detached_clusters() -> list[Detached]:
    """The clusters of this user on this host that were started to outlive their kernels, and live. Local."""
    found = []
    for name, entry in _living()[0].items():
        with contextlib.suppress(ClusterError):
            anchor = Anchor(name, **entry)
            told = anchor.look()
            anchor.leave()
            notes = told["notes"]
            run = notes.get("run")
            found.append(
                Detached(
                    name=name, engines=notes.get("engines", {}).get("size", 0),
                    owner=int(told["owner"].partition(":")[0] or 0), left_s=told["left_s"],
                    run_id="" if run is None else run.run_id, run_state="" if run is None else notes["ended"][0],
                )
            )  # fmt: skip
    return found


def check_detach(patience_s: float) -> None:
    """Raise `PlanError` where engines cannot go on without a kernel for so many seconds."""
    if sys.platform != "linux":
        raise PlanError("engines can outlive the kernel on Linux only: leave --detach away.")
    number = isinstance(patience_s, (int, float)) and not isinstance(patience_s, bool)
    if not (number and 0 < patience_s < math.inf):
        raise PlanError(f"engines cannot wait {patience_s!r} s for a kernel: use a number of seconds, more than 0.")


def _entries() -> Path:
    return records().parent / "clusters"


def _living() -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Folder, process and patience of each anchor of this host that lives, by name; and where the others are.

    What is left of dead ones is removed: of this host's only, for nobody else knows its processes. Those from before it
    was started anew are dead.
    """
    living, elsewhere = {}, {}
    for path in sorted(_entries().glob("*.json")):
        with contextlib.suppress(OSError, ValueError):  # it has just ended, or is just beginning
            entry = json.loads(path.read_text())
            host, its_id = entry.pop("host", host_name()), entry.pop("host_id", host_id())
            same_boot = its_id.partition("/")[0] == host_id().partition("/")[0]
            if host != host_name():
                elsewhere[path.stem] = f"on host {host}"
            elif its_id != host_id() and same_boot:
                elsewhere[path.stem] = f"in another container on {host}"
            elif its_id == host_id() and parent_watch.alive(entry["mark"]):
                living[path.stem] = entry
            else:
                path.unlink()
    return living, elsewhere
