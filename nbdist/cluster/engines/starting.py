"""Start engines, or take over those that an earlier kernel started."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.host_choice import HostChoice
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.cluster.launch.launcher import Launch
from nbdist.errors import ClusterError, PlanError
from nbdist.keepalive import HOST_TIMEOUT_VARIABLE

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines

__all__ = ["check_start", "start_engines", "take_over_engines"]


def check_start(timeout_s: float | None, spares: int | None) -> None:
    """Raise `PlanError` for numbers with which engines cannot be started."""
    if timeout_s is not None and timeout_s <= 0:
        raise PlanError(f"timeout {timeout_s:g} s is too short: use a positive number.")
    if spares is not None and not (isinstance(spares, int) and spares is not True and spares >= 0):
        raise PlanError(f"{spares!r} spares are not possible: use a whole number, 0 or more.")


def start_engines(
    hosts: HostChoice, device: str, timeout_s: float, report: Callable[[str], None], spares: int = 0,
    patience_s: float | None = None,
) -> Engines:  # fmt: skip
    """Start engines; they are ready when this returns.

    Args:
        hosts: How many, on which hosts.
        device: "auto", "cpu" or "cuda".
        timeout_s: Timeout of the start, and later of a replacement, in seconds.
        report: Progress callback: gets a short status text.
        spares: How many spare engines to start too; not waited for.
        patience_s: How long they live without a kernel, in seconds; None if they end with this one.

    Raises:
        PlanError: A host cannot be found, or cannot run so many engines.
        ClusterError: They were not ready in time. Then nothing is left running.
    """
    started_s = time.monotonic()
    if hosts.timeout_s is not None:
        os.environ[HOST_TIMEOUT_VARIABLE] = str(hosts.timeout_s)  # each process takes it from there
    cold = fork_client.current_server() is None
    report("loading torch" if cold else "starting engines")
    stores: list[Any] = []
    own_store = patience_s is None and not hosts.elsewhere  # which needs the launch's address
    loading = threading.Thread(target=_load_and_host, args=(stores, own_store, cold), daemon=True)
    loading.start()  # the kernel needs torch too: loaded while the engines start
    started: Launch | Engines | None = None
    try:
        started = launch = Launch(hosts, patience_s, timeout_s, report)
        launch.wait_for(launch.size, timeout_s, report)
        loading.join()
        store = stores.pop() if stores else _store_of(launch.anchor, launch.address)
        ready = started = _engines(launch, store, launch.size, device, timeout_s, spares)
        del store
        report("forming the world")
        ready.initialize()
    except BaseException:
        if started is not None:
            started.end()
        loading.join()
        stores.clear()  # else the traceback would hold the store, and its process
        raise
    ready.start_seconds = time.monotonic() - started_s
    return ready


def take_over_engines(anchor: Anchor) -> Engines:
    """The engines of an anchor, which an earlier kernel started.

    Raises:
        ClusterError: That kernel ended before they were ready.
    """
    notes = anchor.state()["notes"]
    if "engines" not in notes:
        raise ClusterError(f"cluster {anchor.name} was not ready when its kernel ended: start another one.")
    _load_torch()
    state = notes["engines"]
    launch = Launch.attach(anchor, notes)
    own = {name: state[name] for name in ("size", "device", "timeout_s", "spares")}
    engines = _engines(launch, _store_of(anchor), **own)
    engines.take_over(state)
    return engines


def _engines(*arguments: Any, **named: Any) -> Engines:
    """Make `Engines`. Its module imports torch, which is loaded by now."""
    from nbdist.cluster.engines.engines import Engines

    return Engines(*arguments, **named)


def _load_torch(cold: bool = False) -> None:
    """Load torch; in a `cold` start, which waits for another process to load torch, collect garbage too.

    After torch's import a collection is due soon; it would take 0.1 s within one of the first runs.
    """
    with contextlib.suppress(Exception):  # the next import raises it again, where it can be shown
        importlib.import_module("nbdist.core.comm.world")
    if cold:
        gc.collect()


def _load_and_host(stores: list[Any], host: bool, cold: bool) -> None:
    """Load torch, and host a store unless an anchor does. Early: the store's process starts slowly."""
    _load_torch(cold)
    if host:
        with contextlib.suppress(Exception):  # see above
            stores.append(_store_of(None))


def _store_of(anchor: Anchor | None, address: str = "") -> Any:
    """The store for the ranks' rendezvous: the anchor's, or a new one that other hosts reach at `address`."""
    from nbdist.core.comm.rendezvous import connect_store
    from nbdist.core.comm.world import host_store

    return host_store(address) if anchor is None else connect_store(*anchor.state()["store"])
