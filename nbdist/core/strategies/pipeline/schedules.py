"""Pipeline schedules (GPipe, 1F1B, interleaved): the forwards and backwards of each rank, in order.

They are the schedules of ``torch.distributed.pipelining``. Its executor is not used: it freezes the shapes of a batch
and cannot be interrupted. Nor are its schedules imported: that takes each engine 1.1 s and 834 modules (the compiler
among them), for thirty lines of arithmetic. A test compares both, action by action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nbdist.errors import PlanError, TaskError, suggest
from nbdist.plan.plan import SCHEDULES

__all__ = ["Action", "run_plain_backward", "schedule_actions", "stages_per_rank", "surrogate_loss"]


class Action(NamedTuple):
    """One forward or backward of a rank.

    Args:
        kind: "forward" or "backward".
        stage: The stage, counted over all ranks; stage s is on rank s mod ranks.
        microbatch: The microbatch of the step, from 0.
    """

    kind: str
    stage: int
    microbatch: int


def stages_per_rank(schedule: str) -> int:
    """The number of stages of each rank under a schedule.

    Raises:
        PlanError: The schedule is unknown.
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"unknown schedule {schedule!r}: use {', '.join(SCHEDULES)}.{suggest(schedule, SCHEDULES)}")
    return SCHEDULES[schedule]


def schedule_actions(schedule: str, ranks: int, microbatches: int) -> list[list[Action]]:
    """The actions of each rank in a step, in order.

    There is no deadlock if sends do not block and receives do. Between two ranks, activations arrive in the order in
    which they are received, and so do gradients.

    Args:
        schedule: "gpipe", "1f1b" or "interleaved".
        ranks: Ranks of the pipeline, 1 or more.
        microbatches: Microbatches of the step, 1 or more: any number works with any schedule.

    Returns:
        The actions of each rank.

    Raises:
        PlanError: The schedule is unknown or a number is below one.
    """
    local = stages_per_rank(schedule)
    if ranks < 1 or microbatches < 1:
        raise PlanError(f"a pipeline of {ranks} ranks with {microbatches} microbatches: use 1 or more of each.")
    full = _next_even(microbatches, ranks)
    schedules = [_rank_actions(schedule, rank, ranks, full, local) for rank in range(ranks)]
    return [[action for action in actions if action.microbatch < microbatches] for actions in schedules]


def _next_even(microbatches: int, ranks: int) -> int:
    """The next number that makes equal rounds, as interleaving needs; the caller drops the surplus microbatches."""
    while microbatches % _rounds(microbatches, ranks):
        microbatches += 1
    return microbatches


def _rounds(microbatches: int, ranks: int) -> int:
    return max(1, microbatches // ranks)


def _rank_actions(schedule: str, rank: int, ranks: int, microbatches: int, local: int) -> list[Action]:
    """Warm-up forwards, then one forward and one backward in turn, then the remaining backwards."""
    forwards = _forwards(rank, ranks, microbatches, local)
    backwards = [(ranks * (local - 1) + 2 * rank - stage, microbatch) for stage, microbatch in forwards]
    ranks_after = ranks - 1 - rank  # from here to the rank of the last stage
    first = {
        "gpipe": len(forwards),
        "1f1b": ranks_after,
        "interleaved": (local - 1) * (microbatches // _rounds(microbatches, ranks)) + 2 * ranks_after,
    }[schedule]

    actions = [Action("forward", *work) for work in forwards[:first]]
    rest = forwards[first:]
    for done, work in enumerate(backwards):
        if done < len(rest):
            actions.append(Action("forward", *rest[done]))
        actions.append(Action("backward", *work))
    return actions


def _forwards(rank: int, ranks: int, microbatches: int, local: int) -> list[tuple[int, int]]:
    """(stage, microbatch) of a rank's forwards: each round of microbatches passes through all its stages in turn."""
    round_size = microbatches // _rounds(microbatches, ranks)
    return [
        (rank + ranks * stage, start + i)
        for start in range(0, microbatches, round_size)
        for stage in range(local)
        for i in range(round_size)
    ]


def run_plain_backward(loss: torch.Tensor | None, unwanted: bool) -> None:
    """Run the backward of a whole model. Local; see `Strategy.run_backward`."""
    if loss is None or unwanted:
        return
    if not loss.requires_grad:
        raise TaskError(
            "the loss that the step returns does not require grad, so it trains nothing: return it as it was computed, "
            "without detach, no_grad or a backward of the step's own, which nbdist runs."
        )
    loss.backward()


def surrogate_loss(outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """A scalar whose ``backward()`` gives the same bits as ``torch.autograd.backward(outputs, gradients)``.

    That call imports torch's symbolic shapes at its first use, 0.3 s an engine.

    Args:
        outputs: The outputs of a stage.
        gradients: The gradient of each, in its shape; None if the next stage sent none.

    Returns:
        Zero, with a graph to the outputs that require grad and have a gradient; without one if there are none.
    """
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return torch.zeros(())
    gradients_then_outputs = [g for _, g in pairs] + [o for o, _ in pairs]
    total: torch.Tensor = _PassGradients.apply(len(pairs), *gradients_then_outputs)  # type: ignore[no-untyped-call]
    return total


class _PassGradients(torch.autograd.Function):
    """Passes each output its gradient, whatever the incoming one."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = tensors[:count]
        return tensors[-1].new_zeros((), dtype=torch.float32)  # not complex: it has a backward

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gradients = ctx.gradients
        return (None, *(None for _ in gradients), *gradients)
