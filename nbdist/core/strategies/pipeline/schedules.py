"""Schedules: in which order each rank of a pipeline works, and a backward in two halves for the one that needs it.

The orders are those of ``torch.distributed.pipelining``; its executor is not used, for it freezes the shapes of a batch
and cannot be interrupted. They are worked out here rather than asked for: loading torch's schedules takes each engine
1.1 s and 834 modules (the compiler among them) for what is thirty lines of arithmetic. A test compares them with
torch's, action by action.

The halves of a backward are torch's, from a private module that is loaded without its package (0.7 ms).
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from nbdist.errors import PlanError, suggest
from nbdist.plan.plan import SCHEDULES

__all__ = ["Action", "backward_input", "order", "scalar", "stages_per_rank"]


class Action(NamedTuple):
    """One piece of a rank's work.

    Args:
        kind: "forward"; "backward", the whole of it; or its halves "backward_input" and "backward_weight".
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
    rank sends another arrives in the order in which it is awaited, activations and gradients each by themselves (on
    two ranks, zero-bubble mixes the two differently at both ends).

    Args:
        schedule: "gpipe", "1f1b", "interleaved" or "zero-bubble".
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
    split = schedule == "zero-bubble"
    forwards = _work(rank, ranks, microbatches, local)
    backwards = [(ranks * (local - 1) + 2 * rank - stage, microbatch) for stage, microbatch in forwards]
    hops = ranks - 1 - rank  # to the rank of the last stage
    first = {
        "gpipe": len(forwards),
        "1f1b": hops,
        "interleaved": (local - 1) * (microbatches // _rounds(microbatches, ranks)) + 2 * hops,
        "zero-bubble": (local - 1) * (microbatches // _rounds(microbatches, ranks)) + hops,
    }[schedule]

    actions = [Action("forward", *work) for work in forwards[:first]]
    rest = forwards[first:]
    for done, work in enumerate(backwards):
        if done < len(rest):
            actions.append(Action("forward", *rest[done]))
        actions.append(Action("backward_input" if split else "backward", *work))
        if split and done >= rank:
            actions.append(Action("backward_weight", *backwards[done - rank]))
    if split:
        actions += [Action("backward_weight", *work) for work in backwards[max(0, len(backwards) - rank) :]]
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


def backward_input(
    total: torch.Tensor, inputs: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter]
) -> Callable[[], None]:
    """The first half of ``total.backward()``: only what the stage before waits for. Local.

    The second half adds into `grad` of the parameters without their hooks, in place where there is one already. Where
    no input wants a gradient, all is left to it; without torch's private module, nothing is. Both halves together take
    longer than one backward: 2.6 ms instead of 1.4 for eight small linear layers, 26 instead of 19 for four of a
    transformer (one thread). They pay where ranks would wait for longer.

    Args:
        total: A `scalar`, or the loss on the last stage. It leaves its graph.
        inputs: What the stage was given; their gradients are added into `grad`.
        parameters: Those of the stage.

    Returns:
        The second half, to be called once; it keeps the graph alive until then.
    """
    wanting = [tensor for tensor in inputs if tensor.requires_grad]
    if not total.requires_grad:
        return lambda: None
    if not wanting:
        return total.backward
    halves = _halves()
    if halves is None:
        total.backward()
        return lambda: None

    weights = [parameter for parameter in parameters if parameter.requires_grad]
    edge: Any = get_gradient_edge(total)
    _, groups = halves.stage_backward_input([total], None, wanting, iter(weights))
    covered = {node for group in groups for node in group["params"]}
    apart = [weight for weight in weights if get_gradient_edge(weight).node not in covered]  # beside all inputs
    edge = edge if apart else None  # it holds the whole graph

    def backward_weight() -> None:
        if apart:
            _add_gradients(edge, apart)
        # weights used twice go through nodes of other groups, which must still be there
        halves.stage_backward_weight(iter(weights), groups, retain_graph=True)

    return backward_weight


def _add_gradients(edge: Any, weights: list[nn.Parameter]) -> None:
    gradients = torch.autograd.grad([edge], weights, retain_graph=True, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            continue
        if weight.grad is None:
            weight.grad = gradient
        else:
            weight.grad += gradient


@cache
def _halves() -> types.ModuleType | None:
    """What halves a backward in torch: ``stage_backward_input`` and ``_weight``; None where it has no such thing."""
    package = types.ModuleType("_nbdist_torch_pipelining")  # the real package would load the compiler: 1.1 s
    package.__path__ = [os.path.join(os.path.dirname(torch.__file__), "distributed", "pipelining")]
    sys.modules[package.__name__] = package
    try:
        module = importlib.import_module(f"{package.__name__}._backward")
    except ImportError:
        return None
    return module if hasattr(module, "stage_backward_input") and hasattr(module, "stage_backward_weight") else None
