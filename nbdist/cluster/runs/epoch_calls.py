"""The user's function at the end of each epoch, called in the notebook's main thread while a cell waits for the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nbdist.core.params.program_state import ProgramState
from nbdist.core.task.each_epoch import call_with
from nbdist.core.task.task import Task
from nbdist.engine.epoch_hook import EpochRequests
from nbdist.errors import PeerLostError

__all__ = ["EpochCalls"]


class EpochCalls:
    """Calls ``each_epoch(model, row)`` with the user's own model, which holds the weights after that epoch then.

    Args:
        task: Model and optimizers.
        function: The function.
        name: Of the function.
        requests: What rank 0 asks.
        restores: Whether the model, and what the function keeps in Python, are put back after each call.

    Attributes:
        error: What the function has raised.
    """

    def __init__(
        self, task: Task, function: Callable[[Any, Any], Any], name: str, requests: EpochRequests, *,
        restores: bool = False,
    ) -> None:  # fmt: skip
        self._model, self._optimizers, self._function, self._name = task.model, task.optimizers, function, name
        self._requests: EpochRequests | None = requests
        self._restores = restores
        self.error: Exception | None = None

    def poll(self) -> None:
        """Call it, if an epoch has ended; the ranks go on afterwards.

        Raises:
            KeyboardInterrupt: It was interrupted.
        """
        if self._requests is None:
            return
        try:
            state = self._requests.new()
        except PeerLostError:
            state = None
        if state is None:
            return
        reason = ""
        before = ProgramState({"model": self._model, self._name: self._function}) if self._restores else None
        try:
            state.load_into(self._model)
            reason = call_with(self._model, self._function, state.row, self._name, self._optimizers)
        except Exception as error:
            self.error, reason = error, f"{self._name} failed: {type(error).__name__}: {error}"
        finally:  # also after an interrupt, which stops the run in its next step
            if before is not None:
                before.restore()
            try:
                self._requests.answer(state.number, reason)
            except PeerLostError:
                self._requests = None
