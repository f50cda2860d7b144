"""PendingCall: a call or a cell that runs on an engine; its reply, its failure, its output."""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
from typing import Any

from nbdist.errors import EngineError

__all__ = ["CallError", "EngineDied", "LostCall", "PendingCall"]


class CallError(Exception):
    """A call or a cell raised on its engine. Users see the `EngineError` that is made of it.

    Args:
        kind: The name of the exception's class.
        message: Its text.
        traceback: The engine's own traceback.
    """

    def __init__(self, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message
        self.traceback = traceback

    def as_error(self, where: str, rank: int | None = None) -> EngineError:
        """The error for the user.

        Args:
            where: Whose call it was, such as "rank 3".
            rank: The rank, if the engine has one.
        """
        return EngineError(f"{where}: {self.kind}: {self.message}", self.traceback, rank)


class EngineDied(CallError):
    """The engine's process ended before it replied, or before it was called."""

    def __init__(self) -> None:
        super().__init__("EngineDied", "its process has ended")


class PendingCall(concurrent.futures.Future[Any], abc.ABC):
    """A call or a cell on one engine. Local to the kernel, thread-safe.

    A standard future, for ``concurrent.futures.wait`` too, and the output. A call's result is what its function
    returned; a cell's is None. Its exception is a `CallError`, or where the engine has died an `EngineDied`.
    """

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the reply; returns whether it has come."""
        # Not `concurrent.futures.wait`: an interrupt within it could leave the future locked.
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.exception(timeout_s)
        return self.done()

    @property
    def succeeded(self) -> bool:
        """Whether the reply has come, and is no failure."""
        return self.done() and self.exception() is None

    @abc.abstractmethod
    def printed(self, stream: str) -> str:
        """What it has written so far to "stdout" or "stderr"."""

    @abc.abstractmethod
    def displays(self) -> list[dict[str, Any]]:
        """Its rich outputs so far, as message contents with ``data`` and ``metadata``."""

    @abc.abstractmethod
    def last_expression(self) -> dict[str, Any] | None:
        """The value of a cell's last expression, by MIME type; output too, so it may arrive later than the reply."""

    @abc.abstractmethod
    def wait_for_output(self, timeout_s: float) -> None:
        """Wait for the output of a call that is done: it is sent apart from the reply, and may arrive later."""


class LostCall(PendingCall):
    """A call to an engine that had died before."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception(EngineDied())

    def printed(self, stream: str) -> str:
        """Nothing."""
        return ""

    def displays(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def last_expression(self) -> dict[str, Any] | None:
        """None."""

    def wait_for_output(self, timeout_s: float) -> None:
        """There is none."""
