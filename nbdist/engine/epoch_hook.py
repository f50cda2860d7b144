"""The end of an epoch in the notebook: rank 0 sends it the whole model, and waits until the user's function returns.

Both sides meet in the ranks' store. The answer for an epoch stays there, so that a run that lost a rank meanwhile, and
trains the epoch again, does not call the function twice.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from nbdist.core.comm.rendezvous import as_peer_lost
from nbdist.core.task.each_epoch import EpochHook, EpochState
from nbdist.core.transfer.payload import Payload, Segment, pack
from nbdist.errors import NbdistError

__all__ = ["ClusterHook", "EpochRequests"]

_POLL_S = 0.01  # the store has no notification, and a wait in it could not be interrupted
_ANSWERED_WITHIN_S = 0.1


class ClusterHook(EpochHook):
    """The engine's side: of rank 0.

    Args:
        store: The ranks' store.
        run_id: The run.
        by_file: See `pack`.
        on_rank: Calls the function here instead.
    """

    def __init__(self, store: Any, run_id: str, by_file: bool, on_rank: EpochHook | None = None) -> None:
        self._store, self._keys, self._by_file, self._on_rank = store, _Keys(run_id), by_file, on_rank
        self._segment: Segment | None = None

    def begin(self, state: EpochState) -> None:
        """See `EpochHook`.

        Raises:
            PeerLostError: The store is gone.
        """
        if self._on_rank is not None:
            self._on_rank.begin(state)
            with as_peer_lost():
                self._store.set(self._keys.answer(state.number), self._on_rank.answer(state.number))
            return
        payload, self._segment = pack(state, by_file=self._by_file)
        with as_peer_lost():
            self._store.set(self._keys.request, json.dumps([state.number, payload.path, *payload.extents]))

    def answer(self, number: int) -> str | None:
        """See `EpochHook`.

        Raises:
            PeerLostError: The store is gone.
        """
        key, deadline = self._keys.answer(number), time.monotonic() + _ANSWERED_WITHIN_S
        with as_peer_lost():
            while not self._store.check([key]):
                if self._segment is None or time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_S)
            if self._segment is not None:
                self._segment.close()  # the notebook has mapped it
                self._segment = None
            return bytes(self._store.get(key)).decode()


class EpochRequests:
    """The notebook's side.

    Args:
        store: The ranks' store.
        run_id: The run.
        open_payload: Unpacks a payload of rank 0.
    """

    def __init__(self, store: Any, run_id: str, open_payload: Callable[[Payload], Any]) -> None:
        self._store, self._keys, self._open = store, _Keys(run_id), open_payload

    def new(self) -> EpochState | None:
        """The state after the newest epoch, if it has not been answered.

        Raises:
            PeerLostError: The store is gone.
        """
        with as_peer_lost():
            if not self._store.check([self._keys.request]):
                return None
            number, path, *extents = json.loads(self._store.get(self._keys.request))  # no code, whoever wrote it
            if self._store.check([self._keys.answer(number)]):
                return None
        state: EpochState | None = None
        with contextlib.suppress(
            OSError, NbdistError
        ):  # rank 0 has died, and its memory with it: the next one asks again
            state = self._open(Payload.at(path, extents))
        return state

    def answer(self, number: int, reason: str) -> None:
        """Let the ranks go on after an epoch.

        Args:
            number: Of the epoch.
            reason: Why the run is to end instead; empty if it is not.

        Raises:
            PeerLostError: The store is gone.
        """
        with as_peer_lost():
            self._store.set(self._keys.answer(number), reason)


class _Keys:
    def __init__(self, run_id: str) -> None:
        self._name = f"epochs/{run_id}"
        self.request = f"{self._name}/request"

    def answer(self, number: int) -> str:
        return f"{self._name}/{number}"
