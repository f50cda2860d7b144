"""A dry run leaves no trace in what the model's forward can reach."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.params.preserve_model import preserve_model


class Counted:
    """An object of the user's, with state in containers."""

    def __init__(self):
        self.calls = 0
        self.seen = {"shapes": [[]]}


TOTAL = Counted()


class Model(nn.Module):
    """Changes attributes, buffers, objects within objects, globals and random states."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.counted, self.calls = Counted(), 0
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        self.calls += 1
        self.made = torch.ones(1)
        self.mean += x.mean(0)
        for counted in (self.counted, TOTAL):
            counted.calls += 1
            counted.seen["shapes"][0].append(x.shape)
        return self.linear(x) + torch.randn(3) + torch.randn(3, generator=self.generator)


def state(model):
    counted = [(each.calls, len(each.seen["shapes"][0])) for each in (model.counted, TOTAL)]
    random = torch.get_rng_state().tolist(), model.generator.get_state().tolist()
    return model.calls, hasattr(model, "made"), model.mean.tolist(), counted, random


def test_all_is_as_it_was():
    """Also within objects that attributes and globals only refer to; the memory of weights is not even copied."""
    model = Model()
    before, place, shapes = state(model), model.linear.weight.data_ptr(), model.counted.seen["shapes"][0]
    with preserve_model(model):
        model(torch.ones(2, 3))
        assert state(model) != before
    assert state(model) == before
    assert place == model.linear.weight.data_ptr()
    assert model.counted.seen["shapes"][0] is shapes
