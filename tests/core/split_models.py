"""Models to split, each with an example batch, and one training of them, whole or split."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from problems import seeded
from torch import nn

from nbdist.core.strategies.tensor import Group, TensorPlan, derive_plan, parallelize, verify_plan

VOCABULARY, WIDTH, LENGTH, BATCH = 48, 32, 6, 4


class Block(nn.Module):
    """Attention with q, k, v and o by hand, with fewer heads for k and v, norms over the heads, and a gated MLP."""

    def __init__(self, dropout):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.h = 8
        self.kv_groups = 2
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.q_norm = nn.LayerNorm(WIDTH // self.h)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.attention_dropout, self.inner_dropout, self.dropout = (nn.Dropout(dropout) for _ in range(3))

    def forward(self, x):
        batch, length, _ = x.shape
        normal = self.n1(x)
        q = self.q_norm(self.q(normal).view(batch, length, self.h, -1)).transpose(1, 2)
        k, v = (z(normal).view(batch, length, self.h // 2, -1).transpose(1, 2) for z in (self.k, self.v))
        k, v = (z.repeat_interleave(self.kv_groups, 1) for z in (k, v))
        weights = self.attention_dropout((q @ k.transpose(-2, -1) / 2).softmax(-1))
        x = x + self.dropout(self.o((weights @ v).transpose(1, 2).reshape(batch, length, -1)))
        normal = self.n2(x)
        return x + self.dropout(self.down(self.inner_dropout(F.silu(self.gate(normal)) * self.up(normal))))


class FusedBlock(nn.Module):
    """As in nanoGPT: q, k and v in one layer, split by the width of the input, which is not the local one."""

    def __init__(self, by_attribute=False):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.f1, self.f2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.heads, self.width, self.by_attribute = 4, WIDTH, by_attribute

    def forward(self, x):
        batch, length, width = x.shape
        split = self.width if self.by_attribute else width
        q, k, v = (z.view(batch, length, self.heads, -1).transpose(1, 2) for z in self.qkv(self.n1(x)).split(split, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.o(a.reshape(batch, length, -1 if self.by_attribute else width))
        return x + self.f2(F.gelu(self.f1(self.n2(x))))


class GPT(nn.Module):
    """Two blocks between embeddings and a head, tied or not."""

    def __init__(self, block, tied=True):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([block(), block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """Embedding with a padding index, LSTM, head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16, padding_idx=7), nn.Linear(16, VOCABULARY)
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0])


class Residual(nn.Module):
    """Convolutions with BatchNorm and a residual connection; only the classifier is linear."""

    def __init__(self, classes=8):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def encoder(dropout=0.0, batch_first=True):
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def mlp():
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 12),
        nn.ReLU(inplace=True), nn.Linear(12, 8),
    )  # fmt: skip


def tokens():
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


MODELS: dict[str, Any] = {
    "mlp": (mlp, lambda: numbers(BATCH, 16)),
    "gpt": (lambda: GPT(lambda: Block(0.1)), tokens),
    "fused": (lambda: GPT(lambda: FusedBlock(by_attribute=True), tied=False), tokens),
    "nano": (lambda: GPT(FusedBlock), tokens),
    "encoder": (lambda: encoder(0.1), lambda: numbers(BATCH, LENGTH, WIDTH)),
    "residual": (Residual, lambda: numbers(BATCH, 3, 6, 6)),
    "recurrent": (Recurrent, tokens),
}


def model_and_example(name):
    make, example = MODELS[name]
    return seeded(make, torch.float64), example()


def train(model, example, steps=5):
    """Outputs in training and in evaluation, gradients of the first step, then weights after `steps` of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    outputs, first = [], {}
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        out = model(example)
        (out.tanh() * torch.arange(out.numel()).cos().view_as(out)).mean().backward()
        outputs.append(out.detach().clone())
        first = first or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    model.eval()
    with torch.no_grad():
        outputs.append(model(example))
    model.train()
    return outputs, first


def gpt(tied=True):
    """A GPT with dropout, in float64."""
    return seeded(lambda: GPT(functools.partial(Block, 0.1), tied), torch.float64)


def split(world, model, *example):
    """The model split over the ranks by the derived and verified plan; the split, and the plan."""
    channel = world.channel()
    plan = verify_plan(model, channel, derive_plan(model, channel.size, example), example)
    return parallelize(model, channel, plan), plan


def only(size, layers, **more):
    """A plan of one group."""
    return TensorPlan(size=size, groups=(Group(kind="own", block="", key="own", layers=layers, **more),))
