"""Whether a model that computes its own loss predicts the label at each place, or the next one, as causal models do."""

from __future__ import annotations

import math
from typing import Any

import torch

from nbdist.core.task.metrics import METRICS, perplexity
from nbdist.core.task.steps import ModelLossStep, SupervisedStep
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

__all__ = ["LabelShift"]

_CLOSE, _CLOSE_IN_HALF = 1e-3, 2e-2
"""How far the loss may be from the one that the logits give, relatively."""


class LabelShift:
    """Gives a metric logits and labels that belong together: found by the loss, once on each rank.

    A causal language model is given labels that are its own input; it compares each output with the next label.

    Args:
        task: Its step, and its metric.
    """

    def __init__(self, task: Task) -> None:
        self._classes = task.metric in (METRICS["accuracy"], METRICS["perplexity"])
        self._own = isinstance(task.step, ModelLossStep)
        self._given_pairs = isinstance(task.step, SupervisedStep)
        self._shifted: bool | None = None

    def __call__(self, output: Any, target: Any, loss: torch.Tensor, name: str) -> tuple[Any, Any]:
        """Output and target, of which one place may be cut off.

        Raises:
            TaskError: The loss of the model is that of neither.
        """
        sequences = (
            self._classes and not self._given_pairs and output.ndim == 3 and output.shape[:-1] == target.shape
        )  # fmt: skip
        if not sequences:
            return output, target
        if self._shifted is None:
            self._shifted = self._found(output, target, float(loss), name)
        return (output[:, :-1], target[:, 1:]) if self._shifted else (output, target)

    def _found(self, output: torch.Tensor, target: torch.Tensor, loss: float, name: str) -> bool | None:
        gaps = [math.inf, math.inf]
        for shifted, pair in enumerate([(output, target), (output[:, :-1], target[:, 1:])]):
            mean, count = perplexity(*pair)
            if count:
                gaps[shifted] = abs(float(mean) - loss) / max(abs(loss), 1e-9)
        if not (target != -100).any():  # nothing counts: the next slice tells
            return None
        close = _CLOSE if output.dtype in (torch.float32, torch.float64) else _CLOSE_IN_HALF
        if min(gaps) > close and self._own:
            raise TaskError(
                f"metric {name} cannot tell which label each output predicts: the model's loss is not their cross "
                "entropy. Give a callable metric(output, target) that pairs them."
            )
        return gaps[1] < gaps[0] and gaps[1] <= close
