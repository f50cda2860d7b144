"""An optimizer's references to the model's tensors, saved by name."""

from __future__ import annotations

import json

import pytest
import torch
from problems import alone
from torch import nn
from torch.nn import functional as F

from nbdist.core.optim.tensor_references import TensorReferences
from nbdist.errors import TaskError


def module():
    model = nn.Linear(1, 1)
    model.register_buffer("mean", torch.tensor(3.0))
    return model


def over(model):
    return TensorReferences({**dict(model.named_parameters()), **dict(model.named_buffers())})


@pytest.mark.parametrize(
    "of",
    [
        lambda m: m.bias,
        lambda m: m.mean,
        lambda m: [m.weight, 2.0, m.bias],
        lambda m: (m.weight, m.mean),
        lambda m: {"of": {"first": m.weight}, "count": 2},
        lambda m: [],
    ],
)
def test_what_is_the_models_is_the_models_again(of):
    """They become another model's tensors of the same names, at any depth."""
    left, right = module(), module()
    put = over(right).from_json(of(right), json.loads(json.dumps(over(left).to_json(of(left), "it"))))
    expected = of(right)
    assert type(expected) is type(put)
    assert flat(expected) == flat(put)


def flat(value):
    """Compares tensors by identity."""
    if isinstance(value, dict):
        return [(key, flat(held)) for key, held in value.items()]
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value if not isinstance(
        value, torch.Tensor
    ) else id(value)  # fmt: skip


def test_what_lies_in_the_memory_of_a_parameter_has_no_value_of_its_own():
    """It cannot be saved, and is not overwritten by the number in an older checkpoint."""
    model = module()
    view = model.bias.detach()
    with pytest.raises(TaskError, match="it lies in the memory of a tensor of the model"):
        over(model).to_json([view], "it")
    assert view is over(model).from_json(view, 7.0)
    assert model.bias is over(model).from_json(model.bias, 7.0)


def test_a_tensor_of_the_optimizers_own_is_a_tensor_again():
    """With the saved value, in a list as well."""
    own = torch.tensor(2.0)
    put = over(module()).from_json([torch.tensor(0.0)], over(module()).to_json([own], "it"))
    torch.testing.assert_close([own], put)


class Scaled(nn.Module):
    """A layer with a logit scale, as in CLIP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("most", torch.tensor(1.1))

    def forward(self, x):
        return self.layer(x) * self.scale.exp()


class Clamping(torch.optim.SGD):
    """Clamps the scale, which it refers to in several ways."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.5)
        self.scale, self.all, self.bounds = model.scale, [model.scale, 0], {"most": model.most}
        self.memory = model.scale.data
        self.param_groups[0]["scale"] = [model.scale]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.all[1] += 1
        self.scale.data.clamp_(0.9, self.bounds["most"].item())
        assert self.all[0] is self.scale is self.param_groups[0]["scale"][0]
        assert self.memory.data_ptr() == self.scale.data_ptr()


def test_an_optimizer_that_knows_a_parameter_goes_on_with_it(tmp_path):
    """After a resume it clamps as without one, to the bit."""
    torch.manual_seed(1)
    data, options = (torch.randn(8, 4), torch.randn(8, 4) * 3), {"loss": F.mse_loss, "batch_size": 8, "shuffle": False}
    whole, first, then = Scaled(), Scaled(), Scaled()
    optimizer = Clamping(then)
    alone(whole, data, optimizer=Clamping(whole), steps=6, **options)
    alone(first, data, optimizer=Clamping(first), steps=3, checkpoint=str(tmp_path), **options)
    alone(then, data, optimizer=optimizer, steps=6, resume=str(tmp_path), **options)
    assert whole.scale.item() == then.scale.item()
    assert 6 == optimizer.all[1]
    assert then.most is optimizer.bounds["most"]
