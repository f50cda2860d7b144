"""The models of the parity matrix, as a user of PyTorch writes them, who knows nothing of nbdist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problems import seeded
from torch import nn
from torch.nn import functional as F

VOCABULARY, LENGTH, WIDTH = 32, 8, 16


class MLP(nn.Module):
    """Residual blocks with dropout, and a skip from the first to the last."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))
        self.norm, self.drop, self.last = nn.LayerNorm(WIDTH), nn.Dropout(0.1), nn.Linear(WIDTH, 4)

    def forward(self, x):
        start = hidden = self.first(x)
        for up, down in zip(self.ups, self.downs, strict=True):
            hidden = hidden + self.drop(down(torch.relu(up(hidden))))
        return self.last(self.norm(hidden + start))


class Residual(nn.Module):
    """The block of a ResNet."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        skip = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += skip
        return self.relu(out)


class ResNet18(nn.Module):
    """Eighteen layers, for small images."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
        self.layers = nn.ModuleList(nn.Sequential(Residual(*w), Residual(w[1], w[1], 1)) for w in widths)
        self.fc = nn.Linear(8 * width, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """An encoder and a decoder with skips over the whole length."""

    def __init__(self, width=4):
        super().__init__()
        self.d1, self.d2 = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.d3 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1)
        self.u2, self.u1 = nn.Conv2d(4 * width, 2 * width, 3, 1, 1), nn.Conv2d(4 * width, width, 3, 1, 1)
        self.out = nn.Conv2d(2 * width, 3, 3, 1, 1)

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(a))
        c = F.relu(self.d3(b))
        up = F.relu(self.u2(F.interpolate(c, scale_factor=2.0)))
        up = F.relu(self.u1(F.interpolate(torch.cat([up, b], 1), scale_factor=2.0)))
        return self.out(torch.cat([up, a], 1))


class Attention(nn.Module):
    """Causal attention with separate projections and a mask buffer."""

    def __init__(self, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("mask", torch.tril(torch.ones(LENGTH, LENGTH)) == 0)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(self.mask[:length, :length], -torch.inf)
        return self.o((weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.attention(self.n1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.n2(x)))))


class GPT(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        _, length = tokens.shape
        assert length <= LENGTH, "too long"
        x = self.tokens(tokens) + self.places(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LSTM(nn.Module):
    """Two layers over tokens."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        return self.head(self.lstm(self.tokens(tokens))[0])


def encoder():
    """torch's own transformer."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Linear(WIDTH, 4))


def sequential():
    """Layers in a row."""
    layers = [part for _ in range(6) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, WIDTH), *layers, nn.Dropout(0.1), nn.Linear(WIDTH, 4))


def next_token(output, target):
    """Cross-entropy over all places."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def at_each_place(output, target):
    """Cross-entropy with one target a sample, at its last place."""
    return F.cross_entropy(output[:, -1], target)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with data.

    Args:
        make: The model.
        loss: Its loss, a mean over samples (all of equal length).
        inputs: One of "numbers", "images", "tokens", "sequences".
        target: One of "class", "image", "tokens".
        rounding: How far apart roundings in float32 may carry a weight in five steps.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Any, Any], torch.Tensor]
    inputs: tuple[int, ...] | str
    target: str = "class"
    rounding: float = 1e-5

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The same weights each time."""
        return seeded(self.make, dtype)

    def data(self, samples: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The same samples each time."""
        generator = torch.Generator().manual_seed(1)
        if self.inputs == "tokens":
            x = torch.randint(VOCABULARY, (samples, LENGTH), generator=generator)
            return x, x.roll(-1, 1)
        x = torch.randn(samples, *self.inputs, generator=generator, dtype=torch.float64).to(dtype)
        return x, x.flip(-1) if self.target == "image" else torch.randint(4, (samples,), generator=generator)


CASES = {
    "MLP": Case(make=MLP, loss=F.cross_entropy, inputs=(6,)),
    # BatchNorm over two samples, and that eighteen times, blows a rounding up.
    "ResNet-18": Case(make=ResNet18, loss=F.cross_entropy, inputs=(3, 16, 16), rounding=1e-2),
    "U-Net": Case(make=UNet, loss=F.mse_loss, inputs=(3, 8, 8), target="image"),
    "GPT, tied": Case(make=GPT, loss=next_token, inputs="tokens", target="tokens"),
    "LSTM": Case(make=LSTM, loss=next_token, inputs="tokens", target="tokens"),
    "TransformerEncoder": Case(make=encoder, loss=at_each_place, inputs=(LENGTH, WIDTH)),
    "Sequential": Case(make=sequential, loss=F.cross_entropy, inputs=(6,)),
}
