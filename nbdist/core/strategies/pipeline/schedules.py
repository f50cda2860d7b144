"""Schedules: in which order each rank of a pipeline works.

The orders are those of ``torch.distributed.pipelining``; its executor is not used, for it freezes the shapes of a batch
and cannot be interrupted. They are worked out here rather than asked for: loading torch's schedules takes each engine
1.1 s and 834 modules (the compiler among them) for what is thirty lines of arithmetic. A test compares them with
torch's, action by action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nbdist.errors import PlanError, suggest
from nbdist.plan.plan import SCHEDULES

__all__ = ["Action", "order", "scalar", "stages_per_rank"]


class Action(NamedTuple):
    """One piece of a rank's work.

    Args:
        kind: "forward" or "backward".
        stage: Of which stage, over all ranks; stage s lies on rank s mod ranks.
        microbatch: Of which microbatch of the step, from 0.
    """

    kind: str
    stage: int
    microbatch: int


def stages_per_rank(schedule: str) -> int:
    """Into how many stages a schedule cuts the part of a rank.

    Raises:
        PlanError: There is no such schedule.
    """
    if schedule not in SCHEDULES:
        raise PlanError(f"unknown schedule {schedule!r}: use {', '.join(SCHEDULES)}.{suggest(schedule, SCHEDULES)}")
    return SCHEDULES[schedule]


def order(schedule: str, ranks: int, microbatches: int) -> list[list[Action]]:
    """What each rank does in a step, in order.

    Whoever works through it sends without waiting and waits for what it receives: then no rank waits for ever. What one
    rank sends another arrives in the order in which it is awaited, activations and gradients each by themselves.

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
    orders = [_rank_order(schedule, rank, ranks, full, local) for rank in range(ranks)]
    return [[action for action in actions if action.microbatch < microbatches] for actions in orders]


def _next_even(microbatches: int, ranks: int) -> int:
    """The next number that is cut into equal rounds, which interleaving needs; those beyond are left out again."""
    while microbatches % _rounds(microbatches, ranks):
        microbatches += 1
    return microbatches


def _rounds(microbatches: int, ranks: int) -> int:
    return max(1, microbatches // ranks)


def _rank_order(schedule: str, rank: int, ranks: int, microbatches: int, local: int) -> list[Action]:
    """Forwards until the first gradient can be there, then backward and forward in turns, then the last backwards."""
    forwards = _work(rank, ranks, microbatches, local)
    backwards = [(ranks * (local - 1) + 2 * rank - stage, microbatch) for stage, microbatch in forwards]
    hops = ranks - 1 - rank  # to the rank of the last stage
    first = {
        "gpipe": len(forwards),
        "1f1b": hops,
        "interleaved": (local - 1) * (microbatches // _rounds(microbatches, ranks)) + 2 * hops,
    }[schedule]

    actions = [Action("forward", *work) for work in forwards[:first]]
    rest = forwards[first:]
    for done, work in enumerate(backwards):
        if done < len(rest):
            actions.append(Action("forward", *rest[done]))
        actions.append(Action("backward", *work))
    return actions


def _work(rank: int, ranks: int, microbatches: int, local: int) -> list[tuple[int, int]]:
    """(stage, microbatch) of all forwards of a rank: a round of microbatches through each of its stages in turn."""
    a_round = microbatches // _rounds(microbatches, ranks)
    return [
        (rank + ranks * stage, start + i)
        for start in range(0, microbatches, a_round)
        for stage in range(local)
        for i in range(a_round)
    ]


def scalar(outputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """One number whose ``backward()`` is that of `outputs` under `gradients`, to the bit.

    ``torch.autograd.backward(outputs, gradients)`` loads torch's symbolic shapes at its first use, 0.3 s an engine.

    Args:
        outputs: What a stage computed.
        gradients: The gradient of each, in its shape; None where none came back.

    Returns:
        A zero, in the graph of those outputs that have a gradient and want one; outside of it if there are none.
    """
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return torch.zeros(())
    gradients_then_outputs = [g for _, g in pairs] + [o for o, _ in pairs]
    total: torch.Tensor = _Seed.apply(len(pairs), *gradients_then_outputs)  # type: ignore[no-untyped-call]
    return total


class _Seed(torch.autograd.Function):
    """Hands each output its gradient, whatever its own is."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = tensors[:count]
        return tensors[-1].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gradients = ctx.gradients
        return (None, *(None for _ in gradients), *gradients)
