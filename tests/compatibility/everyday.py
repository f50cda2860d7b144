"""Networks for tables and pairs, and what people do to any network."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case
from torch.utils.checkpoint import checkpoint


def rows(n):
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def sum_loss(output, target):
    return F.cross_entropy(output, target, reduction="sum")


class DLRM(nn.Module):
    def __init__(self, tables=3, dim=6):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, dim))
        self.tables = nn.ModuleList([nn.EmbeddingBag(10, dim, mode="sum") for _ in range(tables)])
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(dim + pairs, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, dense, sparse):
        z = self.bottom(dense)
        features = torch.stack([z] + [table(sparse[:, i]) for i, table in enumerate(self.tables)], dim=1)
        dots = torch.bmm(features, features.transpose(1, 2))
        i, j = torch.tril_indices(features.shape[1], features.shape[1], offset=-1)
        return self.top(torch.cat([z, dots[:, i, j]], dim=1)).squeeze(1)


def clicks(n):
    return torch.randn(n, 4), torch.randint(0, 10, (n, 3, 2)), torch.randint(0, 2, (n,)).float()


class SparseBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(30, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, ids):
        return self.fc(self.bag(ids))


class Tasks(nn.Module):
    """Two tasks, whose weights are learned."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 12)
        self.regress, self.classify = nn.Linear(12, 1), nn.Linear(12, 3)
        self.log_vars = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        h = torch.tanh(self.shared(x))
        return self.regress(h).squeeze(-1), self.classify(h)


def tasks_step(model, batch):
    x, value, label = batch
    predicted, logits = model(x)
    losses = torch.stack([F.mse_loss(predicted, value), F.cross_entropy(logits, label)])
    return (torch.exp(-model.log_vars) * losses + model.log_vars).sum()


class TwoTowers(nn.Module):
    """Each image's own text is the right one among all of the batch."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image, text):
        a, b = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return self.logit_scale.exp() * a @ b.t()


def contrastive_step(model, batch):
    logits = model(*batch)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, *inputs):
        return [F.normalize(self.embed(x), dim=1) for x in inputs]


TRIPLET = nn.TripletMarginLoss(margin=0.5)


def triplet_step(model, batch):
    anchor, positive, negative = model(*batch)
    return TRIPLET(anchor, positive, negative)


def cosine_loss(outputs, same):
    return F.cosine_embedding_loss(outputs[0], outputs[1], same, margin=0.2)


class StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class BinaryNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc2(StraightThroughSign.apply(self.fc1(x)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inp = nn.Linear(6, 12)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.GELU()) for _ in range(3)])
        self.out, self.use_reentrant = nn.Linear(12, 3), use_reentrant

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.out(x)


class MovingNorm(nn.Module):
    """Normalises with a moving average instead of the batch's own statistics."""

    def __init__(self, features, momentum=0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))
        self.register_buffer("steps", torch.tensor(0))
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x):
        y = (x - self.mean) / torch.sqrt(self.var + 1e-5) * self.gain
        if self.training:
            with torch.no_grad():
                self.mean += self.momentum * (x.mean(0) - self.mean)
                self.var += self.momentum * (x.var(0, unbiased=False) - self.var)
                self.steps += 1
        return y


class LazyMask(nn.Module):
    """Creates its mask at the first call."""

    def __init__(self):
        super().__init__()
        self.inp, self.out, self.mask = nn.Linear(6, 6), nn.Linear(6, 3), None

    def forward(self, x):
        if self.mask is None or self.mask.shape[-1] != x.shape[-1]:
            self.mask = torch.triu(torch.ones(x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device))
        return self.out(torch.relu(self.inp(x) @ self.mask))


class Prediction(NamedTuple):
    mean: torch.Tensor
    log_std: torch.Tensor


class Gaussian(nn.Module):
    """Selects and counts features with buffers of whole numbers and truth values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("keep", torch.tensor([0, 1, 3, 4, 5]))
        self.register_buffer("flip", torch.tensor([True, False, False, True, False]), persistent=False)
        self.body, self.heads = nn.Linear(5, 12), nn.ModuleDict({"m": nn.Linear(12, 1), "s": nn.Linear(12, 1)})

    def forward(self, x):
        x = x.index_select(1, self.keep)
        h = F.softplus(self.body(torch.where(self.flip, -x, x)))
        return Prediction(self.heads["m"](h), self.heads["s"](h))


def gaussian_loss(prediction, target):
    return F.gaussian_nll_loss(prediction.mean, target, prediction.log_std.exp() ** 2)


class WideAndDeep(nn.Module):
    """Parameters in a dict, and einsum."""

    def __init__(self):
        super().__init__()
        self.params = nn.ParameterDict({
            "wide": nn.Parameter(torch.zeros(6)),
            "cross": nn.Parameter(torch.randn(6, 6, 2) * 0.1),
            "bias": nn.Parameter(torch.zeros(())),
        })  # fmt: skip
        self.deep = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x):
        cross = torch.einsum("bi,ijk,bj->bk", x, self.params["cross"], x).prod(1)
        return (x @ self.params["wide"] + cross + self.deep(x).squeeze(1) + self.params["bias"]).unsqueeze(1)


UNEVEN = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))


def pairs(n):
    return torch.randn(n, 6), torch.randn(n, 6), torch.randint(0, 2, (n,)) * 2 - 1


def clamp(model):
    for parameter in model.parameters():
        parameter.clamp_(-0.3, 0.3)


CASES = {
    "MLP, class weights": Case(
        make=mlp, data=rows, loss=UNEVEN, double=False, split_at="2",
        weigh=lambda batch: UNEVEN.weight[batch[1]].sum().item(),
    ),
    "MLP, summed loss": Case(make=mlp, data=rows, loss=sum_loss, lr=0.001, split_at="2"),
    "DLRM": Case(make=DLRM, data=clicks, loss=nn.BCEWithLogitsLoss(), split_at="top"),
    "EmbeddingBag, sparse": Case(
        make=SparseBag, data=lambda n: (torch.randint(0, 30, (n, 4)), torch.randint(0, 3, (n,))), loss="cross_entropy",
        split_at="fc",
    ),
    "two tasks, learned weights": Case(
        make=Tasks, data=lambda n: (torch.randn(n, 6), torch.randn(n), torch.randint(0, 3, (n,))), step=tasks_step,
        split_at="regress",
    ),
    "two towers, in-batch negatives": Case(
        make=TwoTowers, data=lambda n: (torch.randn(n, 6), torch.randn(n, 5)), step=contrastive_step, split_at="text"
    ),
    "siamese, triplets": Case(
        make=Siamese, data=lambda n: tuple(torch.randn(3, n, 6)), step=triplet_step, split_at="embed.2"
    ),
    "siamese, cosine": Case(make=Siamese, data=pairs, loss=cosine_loss, split_at="embed.2"),
    "own autograd.Function": Case(make=BinaryNet, data=rows, loss="cross_entropy", split_at="fc2"),
    "checkpoint, reentrant": Case(
        make=lambda: Checkpointed(True), data=rows, loss="cross_entropy", split_at="blocks.1"
    ),
    "checkpoint": Case(make=lambda: Checkpointed(False), data=rows, loss="cross_entropy", split_at="blocks.1"),
    "own moving averages": Case(
        make=lambda: nn.Sequential(nn.Linear(6, 8), MovingNorm(8), nn.ReLU(), nn.Linear(8, 3)), data=rows,
        loss="cross_entropy", sliced=True, split_at="3",
    ),
    "mask made at first call": Case(make=LazyMask, data=rows, loss="cross_entropy", split_at="out"),
    "NamedTuple, index buffers": Case(
        make=Gaussian, data=lambda n: (torch.randn(n, 6), torch.randn(n, 1)), loss=gaussian_loss, split_at="heads.m"
    ),
    "wide and deep, einsum": Case(
        make=WideAndDeep, data=lambda n: (torch.randn(n, 6), torch.randn(n, 1)), loss="mse", split_at="deep"
    ),
    "LBFGS, a closure": Case(make=mlp, data=rows, loss="cross_entropy", optimizer="lbfgs", lr=0.5, split_at="2"),
    "clamped after each step": Case(make=mlp, data=rows, loss="cross_entropy", after=clamp, split_at="2"),
    "moving average of weights": Case(
        make=mlp, data=rows, loss="cross_entropy", optimizer="adamw", lr=0.01, ema=0.9, split_at="2"
    ),
}  # fmt: skip
