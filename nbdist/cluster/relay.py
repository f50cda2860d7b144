"""The relay: carries the engines' snapshots, and in the end their result, to a Run in the notebook."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import ipyparallel.error

from nbdist.cluster.cells import settle
from nbdist.cluster.engines import Engines
from nbdist.cluster.entry import Outcome
from nbdist.cluster.remote_errors import Failure, as_error
from nbdist.cluster.run import Run
from nbdist.errors import ClusterError, NbdistError
from nbdist.telemetry import RankState

__all__ = ["Relay"]

_INTERVAL_S = 0.2  # as often as snapshots come
_LOST = "its process ended; %dist_start replaces it"
_RELEASE_AFTER_S = 2.0
"""How long ranks may take to notice that a peer failed, before they are interrupted."""


class Relay:
    """A thread that follows one run on the engines.

    Args:
        run: Kept up to date, and ended.
        calls: One ipyparallel result a rank, of `entry.train`.
        engines: Where it runs.
        bring_home: Takes the parcel of trained tensors.
        after: Called at the very end with whether the run failed.
        watch: Called with the run after each update; the last time after its end.
    """

    def __init__(
        self,
        run: Run,
        calls: Sequence[Any],
        engines: Engines,
        *,
        bring_home: Callable[[Any], None],
        after: Callable[[bool], None],
        watch: Callable[[Run], None] | None = None,
    ) -> None:
        self._run = run
        self._calls = calls
        self._engines = engines
        self._bring_home = bring_home
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
            failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
            if failures:
                run._end("failed", as_error(failures))
            else:
                self._bring_home(outcomes[0].home)
                run._end(outcomes[0].state)
        except NbdistError as error:
            run._end("failed", error)
        except Exception as error:  # a defect of ours must not leave a person waiting for ever
            run._end("failed", ClusterError(f"the run could not be followed to its end: {error!r}"))
            raise
        finally:
            try:
                with contextlib.suppress(ClusterError):
                    self._after(run.state == "failed")
                self._draw()
            finally:
                run._release()  # whatever else goes wrong, nobody waits for ever

    def _collect(self) -> list[Outcome]:
        """Merge snapshots until every rank has answered; free the others when one has failed."""
        outcomes: dict[int, Outcome] = {}
        deadline = None
        while len(outcomes) < len(self._calls):
            waiting = [rank for rank in range(len(self._calls)) if rank not in outcomes]
            self._calls[waiting[0]].wait(_INTERVAL_S)
            if self._engines.ended:
                raise ClusterError("the engines were stopped while the run was going on.")
            for rank in waiting:
                if self._calls[rank].ready():
                    outcomes[rank] = self._outcome(rank)
            if deadline is None and any(outcome.failure for outcome in outcomes.values()):
                deadline = time.monotonic() + _RELEASE_AFTER_S
            if deadline is not None and time.monotonic() > deadline:
                deadline = float("inf")
                self._engines.interrupt([rank for rank in waiting if rank not in outcomes])
            self._merge(outcomes)
            self._draw()
        return [outcomes[rank] for rank in range(len(self._calls))]

    def _outcome(self, rank: int) -> Outcome:
        try:
            outcome: Outcome = self._calls[rank].get()
            settle(self._calls[rank])
            return outcome
        except ipyparallel.error.RemoteError as error:
            lost = error.ename == "EngineError"  # ipyparallel's word for an engine that died
            kind, message = ("EngineLost", _LOST) if lost else (error.ename, error.evalue)
            failure = Failure(
                rank=rank, time_s=time.time(), kind=kind, message=message, place="", traceback="", echo=False
            )
            snapshot = dataclasses.replace(self._run.progress.ranks[rank], state="lost" if lost else "failed")
            return Outcome(rank=rank, state="failed", snapshot=snapshot, failure=failure)

    def _merge(self, outcomes: dict[int, Outcome]) -> None:
        """Take in the newest snapshot of each rank: the last one from its outcome, for published ones may be late."""
        for rank, call in enumerate(self._calls):
            if rank in outcomes:
                newest = outcomes[rank].snapshot
            else:
                published = call.data.get("nbdist") if isinstance(call.data, dict) else None
                newest = RankState.from_dict(published) if published else None
            if newest is not None:
                self._run.progress.merge(newest)

    def _draw(self) -> None:
        try:
            if self._watch is not None:
                self._watch(self._run)
        except Exception as error:  # a picture that cannot be drawn must not end a training
            self._watch = None
            warnings.warn(f"the run goes on unseen, it cannot be drawn: {error!r}", stacklevel=2)
