"""Gradient accumulation fusion: the same gradients as of torch's linear layers, added where they lie."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import SGD, alone, classes, mlp, train
from torch import nn
from torch.utils import checkpoint

from nbdist.core.strategies.pipeline import gradient_fusion
from nbdist.core.strategies.pipeline.gradient_fusion import GradientFusion

RUN = {"optimizer": SGD, "batch_size": 16, "steps": 3}


class Model(nn.Module):
    """Linear layers as people call them; one of them is called twice, one is tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.rows, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.out.weight = self.rows.weight

    def forward(self, x):
        x = self.hidden(torch.tanh(self.hidden(self.rows(x))))
        x = torch.ops.aten.linear.default(x, self.hidden.weight, self.hidden.bias)
        return self.out(x)


class Checkpointed(Model):
    """Computes its forward again in backward."""

    def forward(self, x):
        x = self.rows(x)
        for reentrant in (False, True):
            x = checkpoint.checkpoint(self.hidden, x, use_reentrant=reentrant)
        return self.out(x)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(gradient_fusion, "_LEAST_BYTES", 0)


@pytest.fixture(params=[Model, Checkpointed])
def model(request):
    torch.manual_seed(0)
    model = request.param().double()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def tokens(seed):
    return torch.randint(9, (3, 5), generator=torch.Generator().manual_seed(seed))


def accumulate(model, fusion=None):
    """The gradients that two microbatches leave."""
    for seed in range(2):
        if fusion is None:
            model(tokens(seed)).square().mean().backward()
            continue
        with fusion:
            loss = model(tokens(seed)).square().mean()
        fusion.backward(loss)
    return [parameter.grad for parameter in model.parameters()]


def test_gradients_are_those_of_torchs_layers(model):
    """Added to the same memory, with layers called twice, tied weights and checkpoints."""
    other = copy.deepcopy(model)
    places = [parameter.grad.data_ptr() for parameter in model.parameters()]
    used = []
    model.hidden.weight.register_post_accumulate_grad_hook(used.append)
    found = accumulate(model, GradientFusion())
    torch.testing.assert_close(found, accumulate(other))
    assert [gradient.data_ptr() for gradient in found] == places
    assert used[0] is model.hidden.weight, "a sync learns from these hooks that a parameter was used"


def test_a_weights_gradient_takes_no_memory_of_its_own():
    """No gradient of the weight itself reaches autograd."""
    layer, fusion = nn.Linear(4, 4), GradientFusion()
    layer.weight.grad = torch.zeros(4, 4)
    with fusion:
        output = layer(torch.ones(2, 4))
    returned = []
    output.grad_fn.register_hook(lambda gradients, _: returned.extend(gradients))
    fusion.backward(output.sum())
    assert [gradient is None for gradient in returned] == [True, True, False], "only the bias has one"
    assert layer.weight.grad.eq(2).all()


@pytest.mark.parametrize("model", [Model], indirect=True)  # torch's reentrant checkpoints refuse it
def test_gradients_that_are_asked_for_are_not_added(model):
    """``torch.autograd.grad`` returns them, and gradients of gradients have a graph."""
    with GradientFusion():
        loss = model(tokens(0)).square().mean()
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    wanted_first = torch.autograd.grad(model(tokens(0)).square().mean(), parameters, create_graph=True)
    wanted = torch.autograd.grad(sum(g.square().sum() for g in wanted_first), parameters)
    torch.testing.assert_close(second, wanted)
    assert not any(parameter.grad.any() for parameter in parameters)


def piped(world):
    gradient_fusion._LEAST_BYTES = 0
    fused, apply = [], gradient_fusion._FusedLinear.apply
    gradient_fusion._FusedLinear.apply = lambda *args: fused.append(args) or apply(*args)
    try:
        trained = train(world, mlp(), classes(32), **RUN, strategy="pipeline", split_at=["2"], microbatches=4)[1]
    finally:
        gradient_fusion._FusedLinear.apply = apply
    return trained, len(fused)


def test_a_pipeline_adds_the_gradients_of_its_microbatches_in_place(run_ranks):
    """And trains the weights of one process."""
    _, expected = alone(mlp(), classes(32), **RUN)
    for trained, fused in run_ranks(2, piped):
        torch.testing.assert_close(trained, expected)
        assert fused == 3 * 4, "each layer, in each of three steps of four microbatches"
