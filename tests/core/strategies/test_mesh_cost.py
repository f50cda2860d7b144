"""What the axes of a mesh say it costs, beside what a run holds and moves; a refusal changes nothing."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, seeded, train, weights
from torch import nn
from torch.nn import functional as F
from two_modules import pair, task_of

from nbdist.core.comm.p2p import ProcessGroupLink
from nbdist.core.comm.process_group import ProcessGroupChannel
from nbdist.core.strategies.mesh_parallel import estimate
from nbdist.core.task.task import Task
from nbdist.errors import PlanError
from nbdist.plan import Plan

WIDTH, LAYERS, BATCH = 64, 8, 64
P = LAYERS * WIDTH * WIDTH
FLOAT = 4


def layers():
    return nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())))


def data():
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, x


def cost(mesh, model=None, optimizer="adamw", **more):
    task = Task.create(model or seeded(layers), data(), loss=F.mse_loss, optimizer=optimizer)
    ranks = torch.tensor([int(part[-1]) for part in mesh.split(",")]).prod().item()
    options = {**task.options, "batch_size": BATCH} | more
    return estimate(task, Plan.create(ranks=ranks, cores=1, strategy=mesh, **options))


@pytest.mark.parametrize(
    ("mesh", "share"),
    {"dp=2": 1, "shard=2": 2, "shard=4": 4, "pp=2": 2, "pp=4": 4, "tp=2": 2, "dp=2,pp=2": 2, "pp=2,tp=2": 4,
     "shard=2,pp=2": 4}.items(),
)  # fmt: skip
def test_memory_is_that_of_the_formula(mesh, share):
    """Adam's four numbers a parameter, over the ranks that share them."""
    stages = next((int(part[-1]) for part in mesh.split(",") if part.startswith("pp")), 1)
    named = [str(2 * LAYERS // stages * stage) for stage in range(1, stages)]  # else they are cut by measured times
    assert cost(mesh, **({"split_at": named} if named else {})).memory == 4 * FLOAT * P // share


@pytest.mark.parametrize(("optimizer", "numbers"), [("sgd", 2), (torch.optim.AdamW, 4), (torch.optim.Adagrad, 3)])
def test_state_is_counted_by_a_trial(optimizer, numbers):
    """A parameter, its gradient, and what the optimizer keeps for each element."""
    assert cost("dp=2", optimizer=optimizer).memory == numbers * FLOAT * P


def test_state_of_several_optimizers_is_that_of_each():
    """SGD with momentum keeps one number for each element of its parameters, AdamW two."""
    task = task_of(pair())
    plan = Plan.create(ranks=2, cores=1, strategy="dp=2", batch_size=BATCH)
    body, head = (sum(p.nbytes for p in module.parameters()) for module in task.modules.values())
    assert (2 + 1) * body + (2 + 2) * head == estimate(task, plan).memory


def test_a_gathered_block_and_its_gradient():
    """One of the eight layers."""
    assert cost("shard=2").gathered == 2 * FLOAT * P // LAYERS


def moved(world, mesh, more):
    """Bytes of floats that this rank's collectives and links take in one step: of three steps, less those of two."""
    counted = [0]

    def counting(kind, name, times):
        original = getattr(kind, name)

        def method(self, given, *args, **kwargs):
            tensors = [given, *args] if isinstance(given, torch.Tensor) else args[0]
            counted[0] += sum(
                t.nbytes * times(self) for t in tensors if isinstance(t, torch.Tensor) and t.dtype is torch.float32
            )
            return original(self, given, *args, **kwargs)

        setattr(kind, name, method)

    counting(ProcessGroupChannel, "start_all_reduce_", lambda _channel: 1)
    counting(ProcessGroupChannel, "all_gather", lambda channel: channel.size)
    counting(ProcessGroupChannel, "reduce_scatter", lambda _channel: 1)
    counting(ProcessGroupLink, "send", lambda _link: 1)
    totals = []
    for steps in (2, 3):
        counted[0] = 0
        train(world, seeded(layers), data(), loss=F.mse_loss, optimizer=SGD, batch_size=BATCH, steps=steps,
              strategy=mesh, **more)  # fmt: skip
        totals.append(counted[0])
    return totals[1] - totals[0]


@pytest.mark.parametrize(("mesh", "more"), [("dp=2", {}), ("shard=2", {}), ("tp=2", {}), ("pp=2", {"microbatches": 2})])
def test_a_step_moves_what_was_estimated(run_ranks, mesh, more):
    """Within a hundredth: the tail of the step, and the headers of gathered blocks, are not counted."""
    ((name, expected),) = cost(mesh, **more).moved.items()
    assert name == mesh[:-2]
    for found in run_ranks(2, moved, mesh, more, channel="process group"):
        assert found == pytest.approx(expected, rel=0.01)


def refused(world):
    model = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    with torch.no_grad():
        model[0].weight.fill_(float(world.rank))
    before = weights(model)
    try:
        train(world, model, data(), loss=F.mse_loss, optimizer=SGD, batch_size=BATCH, steps=1, strategy="pipeline")
    except PlanError as error:
        return str(error), all(torch.equal(before[name], value) for name, value in weights(model).items())
    return "", False


def test_a_refusal_leaves_the_weights_of_every_rank(run_ranks):
    """A model of one layer cannot be cut: all ranks say so, and not even rank 0's weights have been sent."""
    for message, same in run_ranks(2, refused):
        assert "stage" in message
        assert same
