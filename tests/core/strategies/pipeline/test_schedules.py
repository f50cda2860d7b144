"""Pipeline schedules against torch's own, deadlocks, and the surrogate loss of a backward."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nbdist.core.strategies.pipeline.schedules import Action, schedule_actions, stages_per_rank, surrogate_loss
from nbdist.errors import PlanError
from nbdist.plan.plan import SCHEDULES

SIZES = [(ranks, microbatches) for ranks in range(1, 7) for microbatches in range(1, 20)]
KINDS = {"F": "forward", "B": "backward"}
CLASSES = {
    "gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B",
}  # fmt: skip


def check(sequences, stages, microbatches):
    """Run `sequences` with sends that never block; raise on a deadlock or a missing action."""
    done: list[tuple[str, int, int]] = []
    left = [list(actions) for actions in sequences]
    while any(left):
        before = len(done)
        for actions in left:
            while actions and needs(actions[0], stages) <= set(done):
                done += facts(actions.pop(0))
        assert len(done) > before, f"deadlock: the ranks wait at {[actions[:1] for actions in left]}"
    assert all(action.stage % len(sequences) == rank for rank, actions in enumerate(sequences) for action in actions)
    expected = [(k, s, m) for k in ("forward", "backward") for s in range(stages) for m in range(microbatches)]
    assert sorted(expected) == sorted(done), "each once"


def facts(action):
    """The result that `action` produces."""
    return [tuple(action)]


def needs(action, stages):
    """The results that `action` needs."""
    kind, stage, microbatch = action
    if kind == "forward":
        return {("forward", stage - 1, microbatch)} if stage else set()
    after = {("backward", stage + 1, microbatch)} if stage + 1 < stages else set()
    return {("forward", stage, microbatch)} | after


def torchs_schedule(schedule, ranks, microbatches):
    """torch's own schedule, from its classes over dummy stages."""
    import torch.distributed.pipelining.schedules as theirs

    local = stages_per_rank(schedule)
    stages = [
        SimpleNamespace(num_stages=ranks * local, group_size=ranks, group_rank=0, stage_index=i * ranks,
                        is_first=i == 0, is_last=ranks * (i + 1) == ranks * local, submod=nn.Identity(),
                        has_backward=True)
        for i in range(local)
    ]  # fmt: skip
    planned = getattr(theirs, CLASSES[schedule])(stages if local > 1 else stages[0], microbatches, loss_fn=max)
    return [
        [Action(KINDS[a.computation_type.value], a.stage_index, a.microbatch_index)
         for a in planned.pipeline_order[rank] if a is not None and a.computation_type.value in KINDS]
        for rank in range(ranks)
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_deadlocks(schedule):
    """No deadlock; each action runs once, after those it needs; with any number of microbatches."""
    for ranks, microbatches in SIZES:
        sequences = schedule_actions(schedule, ranks, microbatches)
        assert ranks == len(sequences)
        check(sequences, ranks * stages_per_rank(schedule), microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_equal_torchs(schedule):
    """Action by action, for every number of microbatches that torch supports."""
    compared = 0
    for ranks, microbatches in SIZES:
        try:
            theirs = torchs_schedule(schedule, ranks, microbatches)
        except ValueError:  # torch does not support this number
            continue
        if schedule == "1f1b":  # torch's plan for the last rank counts forwards from 1, its execution from 0
            theirs[-1] = [a._replace(microbatch=a.microbatch - (a.kind == "forward")) for a in theirs[-1]]
        assert theirs == schedule_actions(schedule, ranks, microbatches), (ranks, microbatches)
        compared += 1
    assert compared > len(SIZES) / 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers_of_microbatches_that_torch_does_not_support(schedule):
    """For numbers that torch does not support: the next larger schedule, without the surplus microbatches."""
    for ranks, microbatches in SIZES:
        full = -(-microbatches // ranks) * ranks
        if microbatches > ranks and microbatches % (microbatches // ranks):
            larger = next(n for n in range(microbatches, full + 1) if n % (n // ranks) == 0)
            expected = [
                [a for a in actions if a.microbatch < microbatches]
                for actions in schedule_actions(schedule, ranks, larger)
            ]
            assert expected == schedule_actions(schedule, ranks, microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_arrive_in_the_order_of_receives(schedule):
    """Between any two ranks, for activations and gradients each: the transport needs no tags."""
    for ranks, microbatches in SIZES:
        last = ranks * stages_per_rank(schedule) - 1
        sent, awaited = defaultdict(list), defaultdict(list)
        for rank, actions in enumerate(schedule_actions(schedule, ranks, microbatches)):
            for kind, stage, microbatch in actions:
                step = 1 if kind == "forward" else -1
                if step and 0 <= stage + step <= last:
                    sent[rank, (stage + step) % ranks, step].append((stage + step, microbatch))
                if step and 0 <= stage - step <= last:
                    awaited[(stage - step) % ranks, rank, step].append((stage, microbatch))
        assert sent == awaited, (ranks, microbatches)


def test_memory_of_1f1b():
    """With 1f1b a rank holds at most as many microbatches as there are ranks from it to the last; with gpipe, all."""
    for schedule, most in [("1f1b", [4, 3, 2, 1]), ("gpipe", [16] * 4)]:
        for rank, actions in enumerate(schedule_actions(schedule, 4, 16)):
            held, highest = 0, 0
            for action in actions:
                held += 1 if action.kind == "forward" else -1
                highest = max(highest, held)
            assert most[rank] == highest


def test_the_checker_finds_deadlocks():
    """The checker of this module finds a deadlock, and a missing microbatch."""
    sequences = schedule_actions("1f1b", 2, 2)
    with pytest.raises(AssertionError, match="deadlock"):
        check([sequences[0][::-1], sequences[1]], 2, 2)
    with pytest.raises(AssertionError, match="each once"):
        check([actions[:-1] for actions in sequences], 2, 2)


def test_mistakes():
    """Each message names the value and what to use."""
    with pytest.raises(PlanError, match=r"unknown schedule '1f1': use gpipe, .* Did you mean '1f1b'\?"):
        schedule_actions("1f1", 2, 2)
    with pytest.raises(PlanError, match="0 ranks with 2 microbatches: use 1 or more"):
        schedule_actions("gpipe", 0, 2)


def test_torchs_schedules_are_not_loaded():
    """Neither for a schedule nor for a backward: they import the compiler."""
    code = (
        "import sys, torch; from nbdist.core.strategies.pipeline.schedules import *\n"
        "schedule_actions('interleaved', 2, 4)\n"
        "x = torch.ones(2, requires_grad=True); p = torch.nn.Parameter(torch.ones(2))\n"
        "surrogate_loss([x * p], [torch.ones(2)]).backward(); assert 'sympy' not in sys.modules\n"
        "assert not {'torch._dynamo', 'torch.distributed.pipelining'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Branches(nn.Module):
    """A stage with two outputs, a tied weight, a weight beside the input, a view."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.second.weight = self.first.weight
        self.beside = nn.Parameter(torch.randn(6))
        self.unused = nn.Parameter(torch.randn(6))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, x, y):
        h = self.norm(torch.relu(self.first(x)) + y * self.frozen)
        return self.second(h).view(2, -1), (self.beside * 2).exp()


def gradients(model, tensors):
    return [tensor.grad for tensor in [*model.parameters(), *tensors]]


def stage():
    torch.manual_seed(0)
    model = Branches().double()
    tensors = [torch.randn(4, 6, dtype=torch.float64, requires_grad=wanted) for wanted in (True, True)]
    return model, tensors, [torch.randn(2, 12, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]


def test_the_surrogate_loss_has_the_gradients_of_all_outputs():
    """To the bit; without gradients there is nothing to run."""
    model, tensors, seeds = stage()
    torch.autograd.backward(model(*tensors), seeds)
    expected = gradients(model, tensors)
    model, tensors, seeds = stage()
    surrogate_loss(model(*tensors), seeds).backward()
    assert all(a is b or torch.equal(a, b) for a, b in zip(expected, gradients(model, tensors), strict=True))

    model, tensors, _ = stage()
    assert not surrogate_loss(model(*tensors), [None, None]).requires_grad
    assert [None] * len(expected) == gradients(model, tensors)
