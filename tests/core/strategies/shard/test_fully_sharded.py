"""Fully sharded parameters: however a model or a step reads them, the numbers are those of one process."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import seeded, train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nbdist.core.comm.world import World
from nbdist.core.strategies.shard import block as shard_block
from nbdist.errors import PlanError

WIDTH = 6


def layer():
    return nn.Linear(WIDTH, WIDTH)


class Net(nn.Module):
    """Layers, each of which is gathered by itself, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(8))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.extra()

    def extra(self):
        pass

    def body(self, x):
        for one in self.layers:
            x = x + torch.tanh(one(x))
        return x

    def forward(self, x):
        return self.body(x) * self.scale


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = layer()

    def forward(self, x, gate=None):
        return self.mix(x) * torch.tanh(gate)


class GivenAway(Net):
    """Passes its parameter to a child, which alone computes with it."""

    def extra(self):
        self.gate = Gated()

    def forward(self, x):
        return self.gate(self.body(x), self.scale)


class GivenToAChild(Net):
    """Passes a parameter positionally and by name; unchanged, as a view, and as a result of computing with it."""

    def extra(self):
        self.gates = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x):
        x = self.gates[0](self.body(x), self.scale)
        x = self.gates[1](x, gate=self.scale)
        x = self.gates[2](x, self.scale.view(1, -1))
        return self.gates[3](x, gate=self.scale * 2)


class Holder(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.weight, self.give = nn.Parameter(torch.randn(WIDTH, WIDTH)), give
        self.kept = None

    def forward(self):
        self.kept = self.weight.t()
        return {
            "itself": self.weight, "view": self.weight.t(), "views": [self.weight[:3], self.weight[3:]],
            "object": SimpleNamespace(weight=self.weight.t()), "nothing": torch.zeros(()),
        }[self.give]  # fmt: skip


class Returned(Net):
    """A child returns its parameter, a view of it, views in a list, a view in an object, or keeps one."""

    def extra(self):
        self.holders = nn.ModuleDict({give: Holder(give) for give in ("itself", "view", "views", "object", "nothing")})

    def forward(self, x):
        x = self.body(x)
        given = {give: holder() for give, holder in self.holders.items()}
        x = torch.tanh(x @ given["itself"]) @ given["view"]
        x = torch.tanh(x @ torch.cat(given["views"])) @ given["object"].weight
        return x @ self.holders["nothing"].kept * self.scale


class OfOthers(Net):
    """Weights of modules that are never called, and of modules that are called elsewhere."""

    def extra(self):
        self.other, self.table = layer(), nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(WIDTH))})

    def forward(self, x):
        x = F.linear(x, self.other.weight, self.layers[0].bias)
        x = self.body(x) + F.linear(x, self.layers[3].weight)
        return x * sum(self.table) * self.named["a"]


class Tied(Net):
    """One weight in several layers, of which one is called twice."""

    def extra(self):
        self.layers[5].weight = self.layers[1].weight
        self.layers[6] = self.layers[2]
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.layers[4].weight

    def forward(self, x):
        return self.head(self.layers[0](self.body(x)))


class Checkpointed(Net):
    """Checkpoints layers, several at a time, and functions that read weights, nested."""

    reentrant = False

    def again(self, function, *args):
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def several(self, x):
        return self.again(self.layers[3], torch.tanh(self.layers[2](x))) * self.layers[7].bias

    def forward(self, x):
        x = self.layers[0](x)
        x = self.again(self.layers[1], x)
        x = self.again(self.several, x)
        x = self.again(lambda x: torch.tanh(x * self.scale), x)
        x = self.again(lambda x: F.linear(x, self.layers[4].weight), x)
        return self.again(self.body, x)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Functional(Net):
    """A child called with other weights than its own, some of them made of parameters."""

    def extra(self):
        self.inner = layer()

    def forward(self, x):
        weights = {"weight": self.inner.weight * 2, "bias": self.layers[0].bias}
        return torch.func.functional_call(self.inner, weights, (self.body(x),))


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


class OwnBackward(Net):
    """A function with a backward of its own, with the weight of another layer."""

    def forward(self, x):
        return Own.apply(self.body(x), self.layers[2].weight) * self.scale


class Adapted(Net):
    """Takes a gradient step in its forward."""

    def forward(self, x):
        inner = self.layers[0]
        weight, bias = torch.autograd.grad(inner(x).square().mean(), [inner.weight, inner.bias], create_graph=True)
        adapted = {"weight": inner.weight - 0.5 * weight, "bias": inner.bias - 0.5 * bias}
        return super().forward(torch.func.functional_call(inner, adapted, (x,)))


class ReadsItsData(Net):
    """Reads ``data`` and writes nothing there."""

    def forward(self, x):
        weight = self.layers[0].weight
        return super().forward(x @ (weight + (weight.data.sign() - weight.data)))


class Fickle(Net):
    """Reads another module's weight only after some weight has changed, which no example call shows."""

    def extra(self):
        self.register_buffer("first", self.scale.detach().clone())

    def forward(self, x):
        x = self.body(x) * self.scale
        return x if torch.equal(self.first, self.scale) else x @ self.layers[1].weight


class OfTorch(Net):
    """Torch's own modules that read weights without calling the modules that hold them."""

    def extra(self):
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.memory = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(layer())
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)

    def forward(self, x):
        x = self.body(x).view(-1, 2, WIDTH)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.normed(self.encoder(self.memory(x)[0])).view(-1, WIDTH) * self.scale


MODELS = {
    kind.__name__: kind
    for kind in (
        Net, GivenAway, GivenToAChild, Returned, OfOthers, Tied, Checkpointed, CheckpointedReentrant, Functional,
        OwnBackward, Fickle, OfTorch, Adapted, ReadsItsData,
    )
}  # fmt: skip


def error(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def squares(model):
    return sum(p.square().sum() for p in model.parameters())


def penalty_before(model, batch):
    penalty = 1e-2 * squares(model)
    return penalty + error(model, batch)


def penalty_of_two(model, batch):
    pair = model.layers[0].weight.flatten() @ model.layers[7].weight.flatten()
    return error(model, batch) + 1e-2 * (pair + nn.utils.parameters_to_vector(model.parameters()).norm())


def penalty_on_gradients(model, batch):
    x = batch[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return error(model, batch) + 1e-2 * gradient.square().mean()


def two_calls(model, batch):
    return error(model, batch) + error(model, (batch[0] + 1, batch[1]))


def what_it_reads(model, batch):
    with torch.no_grad():
        values = {name: value.clone() for name, value in model.state_dict().items()}
        factor = 1 + 0.1 * model.scale.mean() + 0.1 * values["layers.3.weight"].std()
    return error(model, batch) * float(factor)


STEPS = {
    step.__name__: step for step in (penalty_before, penalty_of_two, penalty_on_gradients, two_calls, what_it_reads)
}


def trained(world, model, step, options):
    made = seeded({**MODELS, **WRITING}[model], torch.float64)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = torch.optim.SGD(made.parameters(), 0.05, momentum=0.9)
    result, weights = train(
        world, made, (x, x.flip(1)), step=step, optimizer=optimizer, batch_size=8, epochs=2, shuffle=False, **options
    )
    return result.history[-1]["loss"], weights


def both(run_ranks, model, step):
    """On two ranks the losses and weights of one process that runs the same slices."""
    expected = trained(World(), model, step, {"accumulate": 2})
    for actual in run_ranks(2, trained, model, step, {"strategy": "shard"}):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_however_a_model_reads_its_parameters(run_ranks, model):
    """Passed on, returned, read outside their module, tied, computed twice: each trains as in one process."""
    both(run_ranks, model, error)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_reads_parameters(run_ranks, step):
    """The step reads it before, after or without the model's forward, with gradient and without."""
    both(run_ranks, "Net", STEPS[step])


def writes_in_the_step(model, batch):
    with torch.no_grad():
        model.scale.mul_(0.5)
    return error(model, batch)


def takes_data(model, batch):
    model.scale.data.mul_(0.5)
    return error(model, batch)


class WritesInForward(Net):
    def forward(self, x):
        with torch.no_grad():
            self.layers[2].weight.clamp_(-1, 1)
        return super().forward(x)


class ReplacesInForward(Net):
    def forward(self, x):
        self.layers[2].weight.data = self.layers[2].weight.data / 2
        return super().forward(x)


class WritesPastAutograd(Net):
    def forward(self, x):
        self.layers[2].weight.data.mul_(0.5)
        return super().forward(x)


class Renormed(Net):
    def extra(self):
        self.table = nn.Embedding(4, WIDTH, max_norm=0.1)

    def forward(self, x):
        return self.body(x) * self.table(torch.arange(len(x)) % 4)


class KeptInBounds(Net):
    """Clamps a weight to bounds that it reaches in training, and not at the start."""

    def extra(self):
        nn.init.uniform_(self.layers[2].weight, -0.09, 0.09)

    def forward(self, x):
        self.layers[2].weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class KeptInBoundsByTheLayer(KeptInBounds):
    """The layer itself clamps, from the third call on."""

    def extra(self):
        super().extra()
        calls = []

        def clamp(module, args):
            calls.append(None)
            if len(calls) > 2:
                module.weight.data.clamp_(-0.1, 0.1)

        self.layers[2].register_forward_pre_hook(clamp)

    def forward(self, x):
        return Net.forward(self, x)


WRITING = {
    kind.__name__: kind
    for kind in (
        WritesInForward, ReplacesInForward, WritesPastAutograd, Renormed, KeptInBounds, KeptInBoundsByTheLayer,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "step", "parameter"),
    [
        ("Net", writes_in_the_step, "scale"),
        ("Net", takes_data, "scale"),
        ("WritesInForward", error, "layers.2.weight"),
        ("ReplacesInForward", error, "layers.2.weight"),
        ("WritesPastAutograd", error, "layers.2.weight"),
        ("Renormed", error, "table.weight"),
        ("KeptInBounds", error, "layers.2.weight"),
        ("KeptInBoundsByTheLayer", error, "layers.2.weight"),
    ],
)
def test_writing_to_gathered_parameters_is_refused(run_ranks, model, step, parameter):
    """The write would be lost: each rank holds a shard only."""
    with pytest.raises(PlanError, match=f"writes to parameter {parameter}.* use the strategy data"):
        run_ranks(2, trained, model, step, {"strategy": "shard"})


class Experts(Net):
    """Computes only the layers that the data select."""

    def extra(self):
        self.experts = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x):
        x = self.body(x)
        chosen = torch.arange(len(x)) % 4 if self.chosen is None else torch.full((len(x),), self.chosen)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                out[chosen == number] += expert(x[chosen == number])
        return out * self.scale

    chosen: int | None = None


def uneven(world):
    def step(model, batch):
        model.chosen = world.rank
        return error(model, batch)

    WRITING["Experts"] = Experts
    trained(world, "Experts", step, {"strategy": "shard"})


def test_ranks_that_compute_different_layers_are_refused(run_ranks):
    """Otherwise a layer would be gathered from the shards of two layers of the same shape."""
    with pytest.raises(PlanError, match=r"needs experts.\d.weight, another one needs another"):
        run_ranks(2, uneven)


def most_memory(world):
    """The largest number of gathered elements of one rank, after the forward and in the backward."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    alive: list[Any] = []
    gather = shard_block.Block.gather
    most = [0]

    def counted(block):
        gather(block)
        alive.extend(map(weakref.ref, block._gathered_data))
        most[0] = max(most[0], sum(whole.numel() for ref in alive if (whole := ref()) is not None))

    shard_block.Block.gather = counted
    x = torch.randn(8, 64)
    train(world, model, (x, x), step=error, optimizer="sgd", batch_size=8, steps=2, strategy="shard")
    return most[0]


def test_at_most_two_blocks_are_gathered_at_a_time(run_ranks):
    """Autograd saves references, and backward gathers again."""
    for most in run_ranks(2, most_memory):
        assert 64 * 64 <= most <= 2 * 64 * 64
