"""How engines begin: started by this kernel, or taken over from an earlier one."""

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
from nbdist.errors import ClusterError

if TYPE_CHECKING:
    from nbdist.cluster.engines.engines import Engines

__all__ = ["start_engines", "take_over_engines"]


def start_engines(
    size: int, device: str, timeout_s: float, tell: Callable[[str], None], spares: int = 0,
    patience_s: float | None = None,
) -> Engines:  # fmt: skip
    """Start engines; they are ready when this returns.

    Args:
        size: How many.
        device: "auto", "cpu" or "cuda".
        timeout_s: How long that, and later a replacement, may take, in seconds.
        tell: Called with what is being done, a few words, meanwhile.
        spares: How many engines without a rank to keep beside them; nobody waits for those.
        patience_s: How long they live without a kernel; None where they end with this one.

    Raises:
        ClusterError: They were not ready in time. Nothing is left running then.
    """
    started_s = time.monotonic()
    cold = fork_client.current_server() is None
    tell("loading torch" if cold else "starting engines")
    hosted: list[Any] = []
    loading = threading.Thread(target=_load_and_host, args=(hosted, patience_s is None, cold), daemon=True)
    loading.start()  # here too, while the engines start
    handoff: Launch | Engines = (launch := Launch(size, patience_s))
    try:
        launch.wait_for(size, timeout_s, tell)
        loading.join()
        engines = handoff = _engines(
            launch, hosted.pop() if hosted else _store_of(launch.anchor), size, device, timeout_s, spares
        )
        tell("forming the world")
        engines.meet()
    except BaseException:
        handoff.end()
        loading.join()
        hosted.clear()  # the traceback would keep the store, and its process
        raise
    engines.start_seconds = time.monotonic() - started_s
    return engines


def take_over_engines(anchor: Anchor) -> Engines:
    """The engines that an earlier kernel started, and tied to an anchor.

    Raises:
        ClusterError: That kernel ended before they were ready.
    """
    notes = anchor.look()["notes"]
    if "engines" not in notes:
        raise ClusterError(f"cluster {anchor.name} was not ready when its kernel ended: start another one.")
    _load_torch()
    told = notes["engines"]
    launch = Launch.attach(anchor, notes["launched"])
    own = {name: told[name] for name in ("size", "device", "timeout_s", "spares")}
    engines = _engines(launch, _store_of(anchor), **own)
    engines.take_over(told)
    return engines


def _engines(*arguments: Any, **named: Any) -> Engines:
    """Make `Engines`, which stands on torch: it has been loaded by now."""
    from nbdist.cluster.engines.engines import Engines

    return Engines(*arguments, **named)


def _load_torch(cold: bool = False) -> None:
    """Load torch; in a `cold` start, which has to wait for another process to do so, look for garbage too.

    With all of torch that is due soon, and would take a tenth of a second in the middle of one of the first runs.
    """
    with contextlib.suppress(Exception):  # who needs it next will meet the error again, and can be told
        importlib.import_module("nbdist.core.comm.world")
    if cold:
        gc.collect()


def _load_and_host(hosted: list[Any], host: bool, cold: bool) -> None:
    """Load torch, and host a store unless an anchor does: the store's process takes its time to start."""
    _load_torch(cold)
    if host:
        with contextlib.suppress(Exception):  # see above
            hosted.append(_store_of(None))


def _store_of(anchor: Anchor | None) -> Any:
    """The store in which ranks meet: the anchor's, or one of our own."""
    from nbdist.core.comm.rendezvous import reach_store
    from nbdist.core.comm.world import host_store

    return host_store() if anchor is None else reach_store(*anchor.look()["store"])
