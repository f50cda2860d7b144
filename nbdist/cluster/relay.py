"""The relay: carries the engines' snapshots, and in the end their result, to a Run in the notebook."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ipyparallel.error

from nbdist.cluster.remote_errors import Failure, as_error
from nbdist.cluster.run import Run
from nbdist.errors import ClusterError, NbdistError
from nbdist.telemetry import RankState

__all__ = ["Relay"]

_INTERVAL_S = 0.1
_RELEASE_AFTER_S = 2.0
"""How long ranks may take to notice that a peer failed, before they are interrupted."""


class Relay:
    """A thread that follows one run on the engines.

    Args:
        run: Kept up to date, and ended.
        calls: One ipyparallel result a rank, of `entry.train`.
        bring_home: Takes the parcel of trained tensors.
        interrupt: Interrupts the given ranks.
        after: Called at the very end with whether the run failed.
        watch: Called with the run after each update; the last time after its end.
    """

    def __init__(
        self,
        run: Run,
        calls: Sequence[Any],
        *,
        bring_home: Callable[[Any], None],
        interrupt: Callable[[list[int]], None],
        after: Callable[[bool], None],
        watch: Callable[[Run], None] | None = None,
    ) -> None:
        self._run = run
        self._calls = calls
        self._bring_home = bring_home
        self._interrupt = interrupt
        self._after = after
        self._watch = watch
        # The context carries which cell output belongs to: some ipykernels fail in a thread without it.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._follow,), daemon=True, name="nbdist-relay")

    def start(self) -> None:
        """Start following."""
        self._thread.start()

    def _follow(self) -> None:
        run = self._run
        try:
            outcomes = self._collect()
            failures = [value for kind, value in outcomes if kind == "failed"]
            if failures:
                run._end("failed", as_error(failures))
            else:
                result, parcel = outcomes[0][1]
                self._bring_home(parcel)
                run._end(result.state)
        except NbdistError as error:
            run._end("failed", error)
        except Exception as error:  # a defect of ours must not leave a person waiting for ever
            run._end("failed", ClusterError(f"the run could not be followed to its end: {error!r}"))
            raise
        finally:
            with contextlib.suppress(ClusterError):
                self._after(run.state == "failed")
            self._draw()
            run._release()

    def _collect(self) -> list[tuple[str, Any]]:
        """Merge snapshots until every rank has answered; free the others when one has failed."""
        outcomes: dict[int, tuple[str, Any]] = {}
        deadline = None
        while len(outcomes) < len(self._calls):
            for rank, call in enumerate(self._calls):
                if rank not in outcomes and call.ready():
                    outcomes[rank] = self._outcome(rank, call)
            if deadline is None and any(kind == "failed" for kind, _ in outcomes.values()):
                deadline = time.monotonic() + _RELEASE_AFTER_S
            if deadline is not None and time.monotonic() > deadline:
                deadline = float("inf")
                self._interrupt([rank for rank in range(len(self._calls)) if rank not in outcomes])
            self._merge()
            self._draw()
            self._calls[next((r for r in range(len(self._calls)) if r not in outcomes), 0)].wait(_INTERVAL_S)
        self._merge()
        return [outcomes[rank] for rank in range(len(self._calls))]

    def _outcome(self, rank: int, call: Any) -> tuple[str, Any]:
        try:
            return call.get()
        except ipyparallel.error.RemoteError as error:
            if error.ename == "EngineError":  # ipyparallel's word for an engine that died
                self._change(rank, state="lost")
                return "failed", _failure(rank, "EngineLost", "its process ended; %dist_start replaces it")
            return "failed", _failure(rank, error.ename, error.evalue)

    def _merge(self) -> None:
        progress = self._run.progress
        for call in self._calls:
            snapshot = (call.data or {}).get("nbdist") if isinstance(call.data, dict) else None
            if snapshot is not None and progress.ranks[snapshot["rank"]].state != "lost":
                progress.merge(RankState.from_dict(snapshot))

    def _change(self, rank: int, **changes: Any) -> None:
        ranks = self._run.progress.ranks
        ranks[rank] = dataclasses.replace(ranks[rank], **changes)

    def _draw(self) -> None:
        if self._watch is not None:
            self._watch(self._run)


def _failure(rank: int, kind: str, message: str) -> Failure:
    return Failure(rank=rank, time_s=time.time(), kind=kind, message=message, place="", traceback="", echo=False)
