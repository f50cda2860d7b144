"""What crosses a cut of a pipeline: complex tensors, masks, views, numbers of each microbatch; and nested outputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from problems import seeded, train
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

SAMPLES, BATCH, WIDTH = 22, 8, 6  # the last batch is smaller: its microbatches have three samples


class Net(nn.Module):
    """The last stage begins with `scale`."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)).to(torch.complex128))


class Rotary(Net):
    """Rotations as complex numbers."""

    def forward(self, x):
        turned = torch.view_as_complex(torch.tanh(self.first(x)).view(-1, 3, 2)) * self.turns
        return self.last(torch.view_as_real(turned * self.scale[:3]).flatten(1))


class Fourier(Net):
    """A conjugate, which is a lazy view, and a spectrum; the example has real outputs only at the end."""

    def forward(self, x):
        spectrum = torch.fft.rfft(self.first(x)).conj()
        return self.last(torch.fft.irfft(spectrum * self.scale[:4], n=WIDTH))


class Turned(Net):
    """A complex parameter."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.polar(torch.ones(4), torch.arange(4.0)).to(torch.complex128))

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.turn * self.scale[:4], n=WIDTH))


class Kinds(Net):
    """Masks, small integers, halves, an empty and an expanded tensor, a transposed one, and a number of the batch."""

    def forward(self, x):
        samples = x.shape[0]
        x = self.first(x)
        mask, small, half = x > 0, (3 * x).to(torch.int8), x.detach().to(torch.float16)
        empty, wide, turned = x[:0], x.mean(0, keepdim=True).expand(samples, -1), x.t()
        weighed = x * self.scale
        y = torch.where(mask, weighed, wide) + 0.1 * small + half.to(x.dtype) + turned.t() + empty.sum()
        return self.last(y / samples)


@dataclass
class Output:
    value: torch.Tensor
    more: dict


pytree.register_dataclass(Output)


class Nested(Net):
    """Returns a registered dataclass, with None, numbers and values of the first stage in it."""

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        value = self.last(hidden * self.scale)
        return Output(value=value, more={"hidden": (hidden, None), "samples": x.shape[0], "kind": "nested"})


def loss(model, batch):
    output = model(batch[0])
    if isinstance(output, Output):
        hidden, nothing = output.more["hidden"]
        assert nothing is None
        assert output.more["kind"] == "nested"
        return F.mse_loss(output.value, batch[1]) + hidden.square().mean() * output.more["samples"]
    return F.mse_loss(output, batch[1])


def data():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.sum(1, keepdim=True)


MODELS = {"rotary": Rotary, "fourier": Fourier, "turned": Turned, "kinds": Kinds, "nested": Nested}
GRADIENT = functools.partial(torch.optim.SGD, lr=0.05)


def made(name):
    model = seeded(MODELS[name])
    for module in (model.first, model.last):
        module.double()
    model.scale.data = model.scale.data.double()
    return model


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def by_hand(name):
    model = made(name)
    optimizer = GRADIENT(model.parameters())
    x, y = data()
    for start in range(0, SAMPLES, BATCH):
        rows = torch.arange(start, min(start + BATCH, SAMPLES))
        optimizer.zero_grad()
        for part in rows.tensor_split(2):
            (loss(model, (x[part], y[part])) * len(part) / len(rows)).backward()
        optimizer.step()
    return state(model)


def on_mesh(world, name):
    model = made(name)
    train(
        world, model, data(), step=loss, optimizer=GRADIENT, batch_size=BATCH, shuffle=False, epochs=1,
        strategy="pp=2", microbatches=2, check="mesh", split_at=["scale"],
    )  # fmt: skip
    return state(model)


@pytest.mark.parametrize("channel", ["shared memory", "process group"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_sends_any_value_forward_and_its_gradient_back(run_ranks, name, channel):
    for trained in run_ranks(2, on_mesh, name, channel=channel):
        torch.testing.assert_close(trained, by_hand(name), rtol=1e-10, atol=1e-12)
