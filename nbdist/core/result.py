"""The result of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nbdist.plan import Plan

__all__ = ["Result"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a training.

    Args:
        state: "finished" or "stopped"; "scaled" if it is to resume on another number of ranks.
        history: One dict per epoch (one for the whole run under `steps`): `epoch`, `steps`, `samples`, `loss` (its
            weighted mean), `seconds`, what steps log; with validation data also `val_loss` and `val_<name>`.
        plan: The plan that was run.
        ranks: The number of ranks that a "scale" command asked for; 0 without one.
        model: The trained model: the user's own, or what their callable has built.
        ema: With the option `ema` the moving average of the weights, as a state_dict of the model (of several, a dict,
            list or tuple of them); frozen parameters are the model's own.
        average: The same as it is sent: what is averaged, by name.
        frozen_stays: Whether parameters that are not trained are as they were.
    """

    state: str
    history: list[dict[str, Any]]
    plan: Plan
    ranks: int = 0
    model: Any = None
    ema: Any = None
    average: dict[str, Any] = field(default_factory=dict)
    frozen_stays: bool = False
