"""Meeting other ranks at a store: always polled, so it is interrupted at once, and ends when the ranks are released.

Inside torch a rank would wait for the others for minutes, deaf to an interrupt. Who hosts the store ends every meeting
of a generation with a word in it; to a rank that is but the echo of another one's loss, `PeerLostError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from nbdist.core.comm.guarded_store import GuardedStore
from nbdist.errors import PeerLostError

__all__ = ["GenerationStore", "barrier", "echoes", "reach_store", "start_group", "untouched"]

T = TypeVar("T")

_MEET_WITHIN_S = 30 * 60.0
_NAP_S, _LONGEST_NAP_S = 2e-4, 2e-3
_LOOK_S = 0.01
_RELEASED = "released"
_SECRET_VARIABLE = "NBDIST_SECRET"
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


def reach_store(name: str, secret: str) -> GuardedStore:
    """Connect to a store that somebody hosts; both are its `address`. Local.

    Raises:
        PeerLostError: Nobody does any more.
    """
    with echoes():
        return GuardedStore(name, secret)


class GenerationStore(dist.Store):
    """What the ranks of one generation say to each other through a store, in which torch would wait unheard.

    Args:
        store: Shared by all generations; every call of it is short.
        generation: Whose.
    """

    def __init__(self, store: Any, generation: int) -> None:
        super().__init__()
        self.underlying_store = store
        self.generation = generation
        # torchrun's store knows none; who starts the ranks may give them one.
        self.secret: bytes = getattr(store, "secret", b"") or os.environ.get(_SECRET_VARIABLE, "").encode()

    def release(self) -> None:
        """Let every wait of this generation end with an error. Local: whoever hosts the store calls it.

        Raises:
            PeerLostError: The store is gone, which ends every wait too.
        """
        with echoes():
            self.underlying_store.set(self._named(_RELEASED), "1")

    def set(self, key: str, value: Any) -> None:
        """Write."""
        with echoes():
            self.underlying_store.set(self._named(key), value)

    def get(self, key: str) -> bytes:
        """Wait for a key, and read it."""
        self.wait([key])
        with echoes():
            return bytes(self.underlying_store.get(self._named(key)))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for keys, and read them."""
        self.wait(keys)
        with echoes():
            return list(self.underlying_store.multi_get([self._named(key) for key in keys]))

    def add(self, key: str, amount: int) -> int:
        """Add to a number; returns the sum."""
        with echoes():
            return int(self.underlying_store.add(self._named(key), amount))

    def delete_key(self, key: str) -> bool:
        """Remove; returns whether it was there."""
        with echoes():
            return bool(self.underlying_store.delete_key(self._named(key)))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there.

        Raises:
            PeerLostError: They are not, and will not be: the ranks were released, or the store is gone.
        """
        with echoes():
            there = bool(keys) and bool(self.underlying_store.check([self._named(key) for key in keys]))
            if not there and self.underlying_store.check([self._named(_RELEASED)]):
                raise PeerLostError("the ranks were released, for another one is gone.")
            return there

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Wait until all keys are there; `timeout` is torch's and not heeded, for the ranks are released in time.

        Raises:
            PeerLostError: See `check`; or they are not there within half an hour.
        """
        nap_s = _NAP_S
        deadline = time.monotonic() + _MEET_WITHIN_S
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise PeerLostError(f"the ranks did not meet within {_MEET_WITHIN_S:g} s.")
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)

    def _named(self, key: str) -> str:
        return f"nbdist/{self.generation}/{key}"


def barrier(store: GenerationStore, name: str, rank: int, size: int, word: str = "") -> list[str]:
    """Wait until every rank is here; returns the `word` of each. **Collective**; `name` is new to the store.

    Raises:
        PeerLostError: See `GenerationStore.wait`.
    """
    store.set(f"{name}/{rank}", word)
    return [told.decode() for told in store.multi_get([f"{name}/{other}" for other in range(size)])]


def untouched(store: Any, rank: int, size: int) -> Any:
    """The part of a store that nobody has written in. **Collective**.

    torchrun lends the same store to processes that it starts again, with all that the dead ones have written there;
    and how often it has started them, its agents need not agree on. So rank 0 lists a word that each has just made up,
    until all have seen their own in the same list.

    Raises:
        PeerLostError: The store is gone, or another rank does not come within half an hour.
    """
    keys, mine = GenerationStore(store, 0), secrets.token_hex(8)
    keys.set(f"here/{rank}", mine)
    deadline = time.monotonic() + _MEET_WITHIN_S
    while time.monotonic() < deadline:
        if rank == 0:
            words = keys.multi_get([f"here/{other}" for other in range(size)])
            listed = b" ".join(words)
            keys.set("listed", listed)
            seen = [f"seen/{other}" for other in range(1, size)]
            if not seen or (keys.check(seen) and set(keys.multi_get(seen)) == {listed}):
                keys.set("agreed", listed)
        elif keys.check(["listed"]) and mine.encode() in (listed := keys.get("listed")).split():
            keys.set(f"seen/{rank}", listed)
        if keys.check(["agreed"]) and mine.encode() in (agreed := keys.get("agreed")).split():
            return dist.PrefixStore(hashlib.sha256(agreed).hexdigest(), store)
        time.sleep(_LONGEST_NAP_S)
    raise PeerLostError(f"the ranks did not meet within {_MEET_WITHIN_S:g} s.")


_of_groups: set[str] = set()
"""The sockets over which process groups talk, as the system calls them."""


def _sockets() -> set[str]:
    """The sockets that this process has open; none where the system does not tell."""
    return {name for _, name in _descriptors() if name.startswith("socket:")}


def _descriptors() -> Iterator[tuple[int, str]]:
    with contextlib.suppress(FileNotFoundError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of the listing itself
                yield int(number), os.readlink(f"/proc/self/fd/{number}")


def _close_in_fork() -> None:
    """A data-loading process would keep them open when its rank hangs up, and the peers would not notice."""
    for number, name in list(_descriptors()):
        if name in _of_groups:
            os.close(number)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def start_group(store: GenerationStore, start: Callable[[], T]) -> T:
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
            before = _sockets()
            result = start()
            _of_groups.intersection_update(before)  # those that are still open
            _of_groups.update(_sockets() - before)
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
            store.check([])
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
