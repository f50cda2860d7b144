"""Rendezvous of ranks at a store, and creation of process groups: polled, so an interrupt or a lost rank ends it.

Inside torch a rank would wait for the others for minutes, and an interrupt would have to wait too. The host of the
store ends every wait of a generation by setting one key (`GenerationStore.release`); the waiting ranks then raise
`PeerLostError`, a secondary failure.
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

from nbdist.core.comm.authenticated_store import GuardedStore
from nbdist.core.comm.group_sockets import noting_group_sockets
from nbdist.errors import PeerLostError

__all__ = ["GenerationStore", "as_peer_lost", "barrier", "connect_store", "start_group", "unused_prefix"]

T = TypeVar("T")

_RENDEZVOUS_TIMEOUT_S = 30 * 60.0
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 2e-4, 2e-3
_POLL_S = 0.01
_RELEASED = "released"
_SECRET_VARIABLE = "NBDIST_SECRET"
_GRACE_S, _INTERRUPTED_GRACE_S = 0.1, 2.0
"""How long an abandoned `start_group` still waits for its thread: after a lost rank, and after an interrupt."""


@contextlib.contextmanager
def as_peer_lost() -> Iterator[None]:
    """Raise a failure of the store, or of a socket to another rank, as a `PeerLostError`."""
    try:
        yield
    except (dist.DistError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PeerLostError(f"the rendezvous failed, another rank or the store is gone ({reason}).") from error


def connect_store(name: str, secret: str) -> GuardedStore:
    """Connect to a store that another process hosts; name and secret are its `address`. Local.

    Raises:
        PeerLostError: The store is gone.
    """
    with as_peer_lost():
        return GuardedStore(name, secret)


class GenerationStore(dist.Store):
    """The keys of one generation in a store. Its waits poll, unlike those of torch's stores, and can be released.

    Args:
        store: Shared by all generations; every call of it is short.
        generation: Whose keys.
    """

    def __init__(self, store: Any, generation: int) -> None:
        super().__init__()
        self.underlying_store = store
        self.generation = generation
        # torchrun's store has no secret; the user may set one for all ranks in the environment.
        self.secret: bytes = getattr(store, "secret", b"") or os.environ.get(_SECRET_VARIABLE, "").encode()

    def release(self) -> None:
        """End every wait of this generation with an error. Local: the host of the store calls it.

        Raises:
            PeerLostError: The store is gone, which ends every wait too.
        """
        with as_peer_lost():
            self.underlying_store.set(self._named(_RELEASED), "1")

    def set(self, key: str, value: Any) -> None:
        """Set a key."""
        with as_peer_lost():
            self.underlying_store.set(self._named(key), value)

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value."""
        self.wait([key])
        with as_peer_lost():
            return bytes(self.underlying_store.get(self._named(key)))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for keys and return their values."""
        self.wait(keys)
        with as_peer_lost():
            return list(self.underlying_store.multi_get([self._named(key) for key in keys]))

    def add(self, key: str, amount: int) -> int:
        """Add to a number; returns the sum."""
        with as_peer_lost():
            return int(self.underlying_store.add(self._named(key), amount))

    def delete_key(self, key: str) -> bool:
        """Remove a key; returns whether it existed."""
        with as_peer_lost():
            return bool(self.underlying_store.delete_key(self._named(key)))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set.

        Raises:
            PeerLostError: They are not, and will not be: the ranks were released, or the store is gone.
        """
        with as_peer_lost():
            found = bool(keys) and bool(self.underlying_store.check([self._named(key) for key in keys]))
            if not found and self.underlying_store.check([self._named(_RELEASED)]):
                raise PeerLostError("the rendezvous was ended, because another rank is gone.")
            return found

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Wait until all keys are set. `timeout`, in torch's signature, is ignored: `release` ends the wait.

        Raises:
            PeerLostError: See `check`; or they are not set within half an hour.
        """
        sleep_s = _FIRST_SLEEP_S
        deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT_S
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise PeerLostError(f"the rendezvous was not complete within {_RENDEZVOUS_TIMEOUT_S:g} s.")
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)

    def _named(self, key: str) -> str:
        return f"nbdist/{self.generation}/{key}"


def barrier(store: GenerationStore, name: str, rank: int, size: int, value: str = "") -> list[str]:
    """Wait until every rank has called; returns every rank's `value`. **Collective**; `name` is new to the store.

    Raises:
        PeerLostError: See `GenerationStore.wait`.
    """
    store.set(f"{name}/{rank}", value)
    return [other.decode() for other in store.multi_get([f"{name}/{other}" for other in range(size)])]


def unused_prefix(store: Any, rank: int, size: int) -> Any:
    """A part of the store, under a prefix, that has no keys yet. **Collective**.

    torchrun gives restarted processes the same store, with the keys of the dead ones; and its agents need not agree on
    the number of restarts. So each rank draws a random token, and rank 0 publishes the list of all tokens, until every
    rank has found its own in the same list. The list's hash is the prefix.

    Raises:
        PeerLostError: The store is gone, or another rank does not arrive within half an hour.
    """
    keys, own_token = GenerationStore(store, 0), secrets.token_hex(8)
    keys.set(f"here/{rank}", own_token)
    deadline = time.monotonic() + _RENDEZVOUS_TIMEOUT_S
    while time.monotonic() < deadline:
        if rank == 0:
            tokens = keys.multi_get([f"here/{other}" for other in range(size)])  # some may be of dead processes
            listed = b" ".join(tokens)
            keys.set("listed", listed)
            seen = [f"seen/{other}" for other in range(1, size)]
            if not seen or (keys.check(seen) and set(keys.multi_get(seen)) == {listed}):
                keys.set("agreed", listed)
        elif keys.check(["listed"]) and own_token.encode() in (listed := keys.get("listed")).split():
            keys.set(f"seen/{rank}", listed)
        if keys.check(["agreed"]) and own_token.encode() in (agreed := keys.get("agreed")).split():
            return dist.PrefixStore(hashlib.sha256(agreed).hexdigest(), store)
        time.sleep(_LONGEST_SLEEP_S)
    raise PeerLostError(f"the rendezvous was not complete within {_RENDEZVOUS_TIMEOUT_S:g} s.")


def start_group(store: GenerationStore, start: Callable[[], T]) -> T:
    """Create a torch process group in a thread, because torch blocks up to 30 s there if a rank has died.

    **Collective**, as `start` is. An abandoned thread ends by itself, and destroys a group that it creates too late.

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
            with noting_group_sockets():
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
        while not ended.wait(_POLL_S):
            store.check([])
    except BaseException as error:
        ended.wait(_GRACE_S if isinstance(error, PeerLostError) else _INTERRUPTED_GRACE_S)  # often it is nearly done
        with lock:
            abandoned = not made
        raise
    if not failed:
        return made[0]
    (failure,) = failed
    if isinstance(failure, RuntimeError):
        reason = str(failure).strip().partition("\n")[0]
        raise PeerLostError(f"a process group could not be created, another rank is gone ({reason}).") from failure
    raise failure
