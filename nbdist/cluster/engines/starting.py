"""Start engines, or take over those that an earlier kernel started."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdist.cluster.launch import fork_client
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.cluster.launch.launcher import Launch
from nbdist.errors import ClusterError, PlanError

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
    size: int, device: str, timeout_s: float, report: Callable[[str], None], spares: int = 0,
    patience_s: float | None = None,
) -> Engines:  # fmt: skip
    """Start engines; they are ready when this returns.

    Args:
        size: How many.
        device: "auto", "cpu" or "cuda".
        timeout_s: Timeout of the start, and later of a replacement, in seconds.
        report: Progress callback: gets a short status text.
        spares: How many spare engines to start too; not waited for.
        patience_s: How long they live without a kernel, in seconds; None if they end with this one.

    Raises:
        ClusterError: They were not ready in time. Then nothing is left running.
    """
    started_s = time.monotonic()
    cold = fork_client.current_server() is None
    report("loading torch" if cold else "starting engines")
    stores: list[Any] = []
    loading = threading.Thread(target=_load_and_host, args=(stores, patience_s is None, cold), daemon=True)
    loading.start()  # the kernel needs torch too: loaded while the engines start
    started: Launch | Engines | None = None
    try:
        started = launch = Launch(size, patience_s)
        launch.wait_for(size, timeout_s, report)
        loading.join()
        engines = started = _engines(
            launch, stores.pop() if stores else _store_of(launch.anchor), size, device, timeout_s, spares
        )
        report("forming the world")
        engines.initialize()
    except BaseException:
        if started is not None:
            started.end()
        loading.join()
        stores.clear()  # else the traceback would hold the store, and its process
        raise
    engines.start_seconds = time.monotonic() - started_s
    return engines


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
    launch = Launch.attach(anchor, notes["launched"])
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


def _store_of(anchor: Anchor | None) -> Any:
    """The store for the ranks' rendezvous: the anchor's, or a new one."""
    from nbdist.core.comm.rendezvous import connect_store
    from nbdist.core.comm.world import host_store

    return host_store() if anchor is None else connect_store(*anchor.state()["store"])
