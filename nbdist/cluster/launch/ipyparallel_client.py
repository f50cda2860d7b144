"""The client of engines over ipyparallel: its messages, results and errors, turned into ours."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
import weakref
from collections.abc import Callable, Collection
from typing import Any

import ipyparallel
from ipyparallel.error import NoEnginesRegistered, RemoteError

from nbdist.cluster.calls.engine_client import EngineClient
from nbdist.cluster.calls.pending_call import CallError, EngineDied, PendingCall
from nbdist.cluster.hosts.ipyparallel_patches import is_death
from nbdist.engine import trampoline
from nbdist.errors import ClusterError

__all__ = ["IpyparallelClient"]

_POLL_S = 0.005
_TRIES = 3


class IpyparallelClient(EngineClient):
    """See `EngineClient`.

    Args:
        connect: Connects a new client of ipyparallel to the controller.
    """

    def __init__(self, connect: Callable[[], ipyparallel.Client]) -> None:
        self._new_client = connect
        self._client: ipyparallel.Client | None = None
        self._declared_dead = set[int]()
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()

    def connect(self) -> None:
        """See `EngineClient`. A request that the controller has not answered, within ipyparallel's 10 s, is repeated.

        Raises:
            ClusterError: It has answered none.
        """
        for _ in range(_TRIES):
            with contextlib.suppress(TimeoutError):
                self._client = self._new_client()
                return
        raise ClusterError(
            f"the controller's process has not answered {_TRIES} requests, each within 10 s: start the engines again; "
            "if that fails too, the machine has no memory or processor left for it."
        )

    @property
    def ids(self) -> list[int]:
        """See `EngineClient`; here from the controller's notices of registration and death."""
        client = self._client
        return [] if client is None else [engine for engine in client.ids if engine not in self._declared_dead]

    def start_call(self, engine: int, name: str, *arguments: object) -> PendingCall:
        """See `EngineClient`."""
        return self._noted(_Call(engine, self._view(engine).apply_async(trampoline.run, name, *arguments)))

    def start_cell(self, engine: int, source: str) -> PendingCall:
        """See `EngineClient`."""
        return self._noted(_Call(engine, self._view(engine).execute(source, silent=False, block=False), cell=True))

    def _noted(self, call: _Call) -> _Call:
        self._calls.add(call)
        if call.engine in self._declared_dead:  # just now
            call.fail()
        return call

    def _view(self, engine: int) -> Any:
        client = self._client
        if client is None:
            raise ClusterError("the engines were stopped.")
        if engine in self._declared_dead:
            raise EngineDied
        try:
            return client[engine]
        except (IndexError, NoEnginesRegistered):
            raise EngineDied from None

    def send_signal(self, engine: int, number: int) -> None:
        """See `EngineClient`; the engine's nanny delivers it."""
        if (client := self._client) is not None:
            with contextlib.suppress(LookupError, NoEnginesRegistered):  # it has just ended
                client.send_signal(number, targets=[engine], block=False)

    def wait_until_dead(self, engines: Collection[int], timeout_s: float) -> bool:
        """See `EngineClient`. ipyparallel has no public event for it."""
        deadline = time.monotonic() + timeout_s
        while not (dead := set(self.ids).isdisjoint(engines)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return dead

    def declare_dead(self, engines: Collection[int]) -> None:
        """See `EngineClient`. The controller would notice by itself, many heartbeats later."""
        self._declared_dead.update(engines)
        for call in list(self._calls):
            if call.engine in self._declared_dead:
                call.fail()

    def look_again(self) -> bool:
        """Replace the connection if a new one knows other engines; returns whether it did.

        It receives the list of engines, and then subscribes to changes: it never learns of an engine that registers in
        between, nor of one that dies, whose calls would not end.
        """
        try:
            client = self._new_client()
        except TimeoutError:  # of the controller, which the next call notices
            return False
        changed = set(client.ids) - self._declared_dead != set(self.ids)
        if changed:
            client, self._client = self._client, client
        client.close()
        return changed

    def close(self) -> None:
        """See `EngineClient`."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


class _Call(PendingCall):
    """A call or a cell.

    Args:
        engine: The id of its engine.
        source: ipyparallel's own result of it.
        cell: Whether it is a cell.
    """

    def __init__(self, engine: int, source: ipyparallel.AsyncResult, *, cell: bool = False) -> None:
        super().__init__()
        self.engine = engine
        self._source = source
        self._cell = cell
        source.add_done_callback(self._finish)

    def _finish(self, source: ipyparallel.AsyncResult) -> None:
        try:
            error = source.exception()
            result = None if self._cell or error is not None else source.result()
            failure = None if error is None else _failure(error)
        except Exception as unexpected:  # raised in a callback it would only be logged, and the call never be done
            result, failure = None, CallError(type(unexpected).__name__, str(unexpected))
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # its engine was declared dead
            if failure is None:
                self.set_result(result)
            else:
                self.set_exception(failure)

    def fail(self) -> None:
        """Its engine is dead; does nothing if the reply has come."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.set_exception(EngineDied())

    def printed(self, stream: str) -> str:
        """See `PendingCall`."""
        return getattr(self._source, stream) or ""

    def displays(self) -> list[dict[str, Any]]:
        """See `PendingCall`."""
        return list(self._source.outputs or [])

    def last_expression(self) -> dict[str, Any] | None:
        """See `PendingCall`."""
        return (self._source.execute_result or {}).get("data")

    def wait_for_output(self, timeout_s: float) -> None:
        """See `PendingCall`. A dead engine sends no more."""
        if not isinstance(self.exception(), EngineDied):
            self._source.wait_for_output(timeout_s)


def _failure(error: BaseException) -> CallError:
    if not isinstance(error, RemoteError):  # such as a reply that cannot be read here
        return CallError(type(error).__name__, str(error))
    if is_death(error):
        return EngineDied()
    return CallError(error.ename, error.evalue, str(error.traceback))
