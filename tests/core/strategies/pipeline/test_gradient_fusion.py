"""Gradient accumulation fusion: the same gradients as of torch's linear layers, added where they lie."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import SGD, alone, classes, mlp, train
from torch import fx, nn
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
        return self.out(nn.functional.linear(x, self.hidden.weight))


class Child(nn.Module):
    """Is called as a whole."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(6, 6)


class Checkpointed(Child):
    """Computes its forward again in backward."""

    def forward(self, x):
        for reentrant in (False, True):
            x = checkpoint.checkpoint(self.hidden, x, use_reentrant=reentrant)
        return x


class Mapped(Child):
    """Maps a layer over the batch."""

    def forward(self, x):
        return torch.func.vmap(self.hidden)(x)


class Implicit(Child):
    """Solves for its gradient with gradients of its own, in backward."""

    def forward(self, x):
        z = self.hidden(x).tanh()
        start = z.detach().requires_grad_()
        again = self.hidden(start).tanh()
        z.register_hook(lambda g: g + 0.1 * torch.autograd.grad(again, start, g, retain_graph=True)[0])
        return z


class Probed(nn.Module):
    """A hook in backward differentiates a layer of the stage itself."""

    def forward(self, x, z):
        y = z * 2
        y.register_hook(lambda g: g + torch.autograd.grad(z, x, g, retain_graph=True)[0])
        return y


class Written(nn.Module):
    """Writes to what a layer returns, as a view of a batch of sequences."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, x):
        x = self.act(self.first(x))
        x = self.last(x).view(-1, 6).transpose(0, 1).mul_(3.0)
        return x.t()


class Complex(nn.Module):
    """A layer over complex numbers."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(6, 6, dtype=torch.complex128)

    def forward(self, x):
        return torch.view_as_real(self.inside(torch.complex(x, x * 2)))


class Hooked(Child):
    """A hook changes what the layer returns."""

    def __init__(self):
        super().__init__()
        self.hidden.register_forward_hook(lambda layer, given, output: output * 3)

    def forward(self, x):
        return self.hidden(x)


class Probe(nn.Module):
    """See `Probed`."""

    def __init__(self):
        super().__init__()
        self.hidden, self.probe = nn.Linear(6, 6), Probed()

    def forward(self, x):
        return self.probe(x, self.hidden(x))


MODELS = {
    "calls": Model,
    **{kind.__name__: lambda kind=kind: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), kind(), nn.Linear(6, 6))
       for kind in (Checkpointed, Mapped, Implicit, Probe, Written, Hooked)},
    "Complex": lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), Complex()),
}  # fmt: skip


class Tracer(fx.Tracer):
    """Leaves whole what is called as a whole in a stage."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, (Checkpointed, Mapped, Implicit, Probed)) or super().is_leaf_module(
            m, module_qualified_name
        )


def stage_of(model):
    return fx.GraphModule(model, Tracer().trace(model))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(gradient_fusion, "_LEAST_BYTES", 0)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model = model if request.param == "Complex" else model.double()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(parameter.dtype if parameter.is_complex() else torch.float64)
        parameter.grad = torch.zeros_like(parameter)
    return model


def tokens(seed):
    return torch.randint(9, (3, 5), generator=torch.Generator().manual_seed(seed))


def accumulate(model, fusion=None):
    """The gradients that two microbatches leave."""
    stage = stage_of(model)
    for seed in range(2):
        module = stage if fusion is None else fusion.fused(stage)
        loss = module(tokens(seed)).square().mean()
        if fusion is None:
            loss.backward()
        else:
            fusion.backward(loss)
    return [parameter.grad for parameter in model.parameters()]


def test_gradients_are_those_of_torchs_layers(model):
    """Added to the same memory."""
    other, fusion, fused = copy.deepcopy(model), GradientFusion(), []
    places = [parameter.grad.data_ptr() for parameter in model.parameters()]
    apply = gradient_fusion._FusedLinear.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_fusion._FusedLinear, "apply", lambda *args: fused.append(args) or apply(*args))
        found = accumulate(model, fusion)
    torch.testing.assert_close(found, accumulate(other))
    assert [gradient.data_ptr() for gradient in found] == places
    assert fused


def test_a_weights_gradient_takes_no_memory_of_its_own():
    """No gradient of the weight itself reaches autograd; a sync learns that the weight was used."""
    layer, fusion, used = nn.Linear(4, 4), GradientFusion(), []
    layer.weight.grad = torch.zeros(4, 4)
    layer.weight.register_post_accumulate_grad_hook(used.append)
    output = fusion.fused(stage_of(nn.Sequential(layer)))(torch.ones(2, 4))
    returned = []
    output.grad_fn.register_hook(lambda gradients, _: returned.extend(gradients))
    fusion.backward(output.sum())
    assert [gradient is None for gradient in returned] == [True, True, False], "only the bias has one"
    assert layer.weight.grad.eq(2).all()
    assert used[0] is layer.weight


@pytest.mark.parametrize("model", ["calls", "Mapped", "Written"], indirect=True)
def test_gradients_that_are_asked_for_are_not_added(model):
    """``torch.autograd.grad`` returns them, and gradients of gradients have a graph."""
    stage, parameters = stage_of(model), list(model.parameters())
    both = []
    for module in (GradientFusion().fused(stage), stage):
        first = torch.autograd.grad(module(tokens(0)).square().mean(), parameters, create_graph=True)
        both.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))
    torch.testing.assert_close(*both)
    assert not any(parameter.grad.any() for parameter in parameters)


def test_the_modes_of_modules_stay():
    """A stage in training may have a module in evaluation."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[1].eval()
    fused = GradientFusion().fused(stage_of(model))
    assert (True, True, False) == (fused.training, model[0].training, model[1].training)


def test_a_stage_without_large_weights_is_left_alone(monkeypatch):
    """A function in Python costs more than it saves."""
    monkeypatch.setattr(gradient_fusion, "_LEAST_BYTES", 2**20)
    stage = stage_of(Model())
    assert stage is GradientFusion().fused(stage)


def piped(world):
    gradient_fusion._LEAST_BYTES = 0
    fused, apply = [], gradient_fusion._FusedLinear.apply
    gradient_fusion._FusedLinear.apply = lambda *args: fused.append(args) or apply(*args)
    try:
        trained = train(
            world, mlp(), classes(32), **RUN, strategy="pipeline", split_at=["2"], microbatches=4, check="no"
        )[1]
    finally:
        gradient_fusion._FusedLinear.apply = apply
    return trained, len(fused)


def test_a_pipeline_adds_the_gradients_of_its_microbatches_in_place(run_ranks):
    """And trains the weights of one process."""
    _, expected = alone(mlp(), classes(32), **RUN)
    for trained, fused in run_ranks(2, piped):
        torch.testing.assert_close(trained, expected)
        assert fused == 3 * 4, "each layer, in each of three steps of four microbatches"
