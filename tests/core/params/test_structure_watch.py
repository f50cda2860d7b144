"""What changes in the middle of a run is named in the step where it happens, before its update."""

from __future__ import annotations

import pytest
import torch
from problems import assert_same_bits, classes, mlp, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.comm.world import World
from nbdist.errors import TaskError

OPTIMIZER = []


def frozen(model):
    model[0].bias.requires_grad_(False)


def unfrozen(model):
    model[3].bias.requires_grad_(True)


def exchanged(model):
    model[3] = nn.Linear(8, 3, dtype=torch.float64)


def another_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def appended(model):
    model.append(nn.Identity())


def added(model):
    OPTIMIZER[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


CHANGES = {
    frozen: "0.bias was frozen in step 2: .* stop the run",
    unfrozen: "3.bias was unfrozen in step 2",
    exchanged: "3 was exchanged or removed in step 2",
    another_parameter: "0.weight was exchanged or removed in step 2",
    appended: "the model has 5 of what were 4 members in step 2",
    added: "groups have other parameters since step 2",
}


def prepared():
    model = mlp()
    model.register_buffer("memory", torch.zeros(2))
    model[3].bias.requires_grad_(False)
    OPTIMIZER[:] = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)]
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named_before_the_update(change):
    """The weights are those after the step before."""
    model, expected, seen = prepared(), prepared(), []

    def step(model, batch):
        seen.append(1)
        if len(seen) == 2:
            change(model)
        return F.cross_entropy(model(batch[0]), batch[1])

    model = prepared()
    kept = dict(model.named_parameters())
    options = {"optimizer": OPTIMIZER[0], "batch_size": 8, "shuffle": False}
    with pytest.raises(TaskError, match=CHANGES[change]):
        train(World(), model, classes(32), step=step, steps=3, **options)
    expected = prepared()
    train(World(), expected, classes(32), steps=1, **{**options, "optimizer": OPTIMIZER[0]})
    wanted = weights(expected)
    assert_same_bits({name: wanted[name] for name in kept}, {name: p.detach() for name, p in kept.items()})


def test_a_buffer_may_be_replaced_by_one_of_the_same_shape():
    """As a moving average does that is assigned."""
    model = prepared()

    def step(model, batch):
        model.memory = model.memory + 1
        return F.cross_entropy(model(batch[0]), batch[1])

    train(World(), model, classes(32), step=step, optimizer=OPTIMIZER[0], batch_size=8, steps=3)
    assert model.memory.tolist() == [3.0, 3.0]
