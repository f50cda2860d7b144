"""The end of an epoch: buffers averaged, replicas compared, evaluation, the row of the history, the user's function."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nbdist.core.comm.world import World
from nbdist.core.evaluation.evaluation import Evaluation
from nbdist.core.params.made_buffers import persistence
from nbdist.core.params.replicas import check_replicas
from nbdist.core.params.weight_copies import WeightCopies
from nbdist.core.reporter import Reporter
from nbdist.core.state.extra_states import ExtraStates
from nbdist.core.state.train_progress import TrainProgress
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.task.each_epoch import EpochHook, EpochState
from nbdist.errors import TaskError
from nbdist.plan import Plan
from nbdist.plan.early_stop import EarlyStop
from nbdist.telemetry import EpochFinished, Evaluating, Event, Noted

__all__ = ["EpochEnd"]


class EpochEnd:
    """What happens after the last step of an epoch, or of a run under `steps`.

    Args:
        strategy: What is trained.
        plan: Its options.
        world: All ranks.
        evaluation: On the validation data, if there are any.
        extra: The modules' extra states.
        copies: Of the weights.
        hook: Of the user's function, on rank 0.
        emit: Called with events.
    """

    def __init__(
        self, strategy: Strategy, plan: Plan, world: World, evaluation: Evaluation | None, extra: ExtraStates,
        copies: WeightCopies, hook: EpochHook | None, emit: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self._strategy, self._plan, self._world = strategy, plan, world
        self._evaluation, self._extra, self._copies = evaluation, extra, copies
        self._hook, self._emit = hook, emit

    def row(self, progress: TrainProgress, reporter: Reporter, *, stopped: bool) -> dict[str, Any]:
        """Close the row of the history; a stopped run is not evaluated. **Collective** over the world."""
        strategy, axes = self._strategy, self._strategy.axes
        seconds = progress.row.seconds  # before evaluation: a row counts training only
        strategy.average_buffers()
        check_replicas(strategy.table, axes, progress.step)
        reporter.report(progress, progress.row.loss.value, progress.row.samples / seconds)
        measured: dict[str, Any] = {}
        if self._evaluation is not None and not stopped:
            self._emit(Evaluating(rank=self._world.rank))
            strategy.set_modes(training=False)
            try:
                with strategy.batch_gather.at_step(progress.step):
                    measured = self._evaluation.run()
            finally:
                strategy.set_modes(training=True)
        row = progress.row.close(axes.world, axes.reports_loss, len(progress.history) + 1, seconds) | measured
        self._emit(EpochFinished(rank=self._world.rank, row=row))
        return row

    def keep(self, row: Mapping[str, Any]) -> None:
        """Keep the weights of the best epoch, as they are evaluated: some optimizers train others. Local."""
        if self._plan.keep_best:
            self._strategy.set_modes(training=False)
            try:
                self._copies.end_row(row)
            finally:
                self._strategy.set_modes(training=True)

    def ends(self, progress: TrainProgress) -> bool:
        """Whether the history says that the run ends now, before its last epoch. Local."""
        reason = EarlyStop.parse(self._plan.early_stop).reason(progress.history) if self._plan.early_stop else ""
        self._note(reason)
        return bool(reason)

    def call(self, progress: TrainProgress) -> bool:
        """Call the user's function on the whole model; returns whether it ends the run. **Collective** (world).

        Raises:
            TaskError: The function fails on rank 0.
        """
        if not self._plan.each_epoch:
            return False
        strategy, channel = self._strategy, self._strategy.axes.world
        self._emit(Evaluating(rank=self._world.rank))
        strategy.set_modes(training=False)  # some optimizers evaluate other weights than they train
        try:
            whole = strategy.table.whole(strategy.axes, keep=self._world.rank == 0)
            extra = self._extra.whole()
            failure: TaskError | None = None
            number = len(progress.history)
            if self._hook is not None and self._hook.answer(number) is None:
                persistent = persistence(strategy.task.model)
                state = EpochState(
                    number=number, row=progress.history[-1], tensors=whole, persistent=persistent, extra=extra
                )
                try:
                    self._hook.begin(state)
                except TaskError as error:
                    failure = error
            reason = None
            while reason is None:  # a collective a moment, so that every rank notices if another one dies
                answer = self._hook.answer(number) if self._hook is not None and failure is None else None
                message = json.dumps([answer, "" if failure is None else str(failure)]).encode()
                reason, problem = json.loads(channel.broadcast_bytes(message))
                if problem:
                    raise failure or TaskError(problem)
        finally:
            strategy.set_modes(training=True)
        self._note(reason)
        return bool(reason)

    def was_ended(self, progress: TrainProgress) -> bool:
        """Whether the function has ended the run already, before a rank was lost. **Collective** over the world."""
        if not (self._plan.each_epoch and progress.history):
            return False
        answer = None if self._hook is None else self._hook.answer(len(progress.history))
        return bool(json.loads(self._strategy.axes.world.broadcast_bytes(json.dumps(answer).encode())))

    def _note(self, reason: str) -> None:
        if reason and self._world.rank == 0:
            self._emit(Noted(rank=self._world.rank, text=f"the run ends early: {reason}"))
