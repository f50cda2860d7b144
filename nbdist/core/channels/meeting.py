"""Meeting other ranks at a store: always polled, so it is interrupted at once, and ends when the store goes away.

Inside torch a rank would wait for the others for minutes, deaf to an interrupt. Who hosts the store ends every meeting
by dropping it; to a rank that is no more than the echo of another one's loss, `PeerLostError`.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from nbdist.errors import PeerLostError

__all__ = ["check", "echoes", "look_up", "meet", "reach_store", "start_group"]

T = TypeVar("T")

_MEET_WITHIN_S = 30 * 60.0
_CONNECT_WITHIN = datetime.timedelta(seconds=2)
_WAIT_WITHIN = datetime.timedelta(minutes=5)
_NAP_S, _LONGEST_NAP_S = 2e-4, 2e-3
_LOOK_S = 0.01
_LATE_S = 0.1
_STAY_S = 2.0


@contextlib.contextmanager
def echoes() -> Iterator[None]:
    """Let a failure of the store, or of a socket to another rank, be a `PeerLostError`."""
    try:
        yield
    except (dist.DistError, OSError) as error:
        words = str(error).strip().partition("\n")[0]
        raise PeerLostError(f"the ranks could not meet, one of them or their store is gone ({words}).") from error


def reach_store(address: str, port: int) -> Any:
    """Connect to a store that somebody hosts. Local.

    Raises:
        PeerLostError: Nobody does any more.
    """
    with echoes():
        socket.create_connection((address, port), _CONNECT_WITHIN.total_seconds()).close()  # torch would try on and on
        store = dist.TCPStore(address, port, is_master=False, timeout=_CONNECT_WITHIN)
        store.set_timeout(_WAIT_WITHIN)
        return store


def check(store: Any, keys: list[str]) -> bool:
    """Whether all `keys` are there; notices that the store is gone. Local.

    Raises:
        PeerLostError: It is.
    """
    with echoes():
        return bool(store.check(keys))


def look_up(store: Any, keys: list[str]) -> list[str]:
    """Wait for `keys` and return what they hold. Local.

    Raises:
        PeerLostError: The store is gone, or nobody has set one of them within half an hour.
    """
    nap_s = _NAP_S
    deadline = time.monotonic() + _MEET_WITHIN_S
    while not check(store, keys):
        if time.monotonic() > deadline:
            raise PeerLostError(f"the ranks did not meet within {_MEET_WITHIN_S:g} s.")
        time.sleep(nap_s)
        nap_s = min(2 * nap_s, _LONGEST_NAP_S)
    with echoes():
        return [value.decode() for value in store.multi_get(keys)]


def meet(store: Any, name: str, rank: int, size: int, word: str = "") -> list[str]:
    """Wait until every rank is here; returns the `word` of each. **Collective**; `name` is new to the store.

    Raises:
        PeerLostError: See `look_up`.
    """
    with echoes():
        store.set(f"{name}/{rank}", word)
    return look_up(store, [f"{name}/{other}" for other in range(size)])


def start_group(store: Any, start: Callable[[], T]) -> T:
    """Let torch connect a process group, in a thread of its own: there it waits up to 30 s for a rank that has died.

    **Collective**, as `start` is. A thread that is given up ends by itself, and takes down what it made too late.

    Raises:
        PeerLostError: Another rank or the store is gone.
    """
    made: list[T] = []
    failed: list[BaseException] = []
    ended = threading.Event()
    lock = threading.Lock()
    abandoned = False

    def connect() -> None:
        try:
            result = start()
            with lock:
                made.append(result)
                if abandoned and dist.is_initialized():
                    dist.destroy_process_group()
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    threading.Thread(target=connect, daemon=True, name="nbdist-group").start()
    try:
        while not ended.wait(_LOOK_S):
            check(store, [])
    except BaseException as error:
        ended.wait(_LATE_S if isinstance(error, PeerLostError) else _STAY_S)  # most often it is nearly through
        with lock:
            abandoned = not made
        raise
    if not failed:
        return made[0]
    (failure,) = failed
    if isinstance(failure, RuntimeError):
        words = str(failure).strip().partition("\n")[0]
        raise PeerLostError(f"a group of ranks could not meet, one of them is gone ({words}).") from failure
    raise failure
