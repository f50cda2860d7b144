"""Losses of many kinds, and batches in other forms than (x, y) with the samples first."""

from __future__ import annotations

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from case import Case
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

import nbdist

PAD = 0


def classes(n):
    return torch.randn(n, 6), torch.randint(0, 4, (n,))


def uneven(n):
    """Half of the first targets are class 0, none of the last."""
    x, y = torch.randn(n, 6), torch.randint(1, 4, (n,))
    return x, y.where(torch.arange(n) % 12 > 6, 0)


def mlp(out=4):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, out))


def focal(output, target):
    log_p = F.log_softmax(output, dim=-1).gather(1, target[:, None]).squeeze(1)
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def dice(output, target):
    """Of each sample, then their mean."""
    p, t = output.softmax(-1), F.one_hot(target, 4)
    return (1 - 2 * (p * t).sum(1) / (p + t).sum(1)).mean()


def pinball(output, target):
    error = target[:, None] - output
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=output.dtype)
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def masked_mse(model, batch):
    x, y, mask = batch
    error = (model(x) - y).square()
    return (error * mask).sum() / mask.sum(), mask.sum()


def weighted(model, batch):
    x, y, w = batch
    each = F.cross_entropy(model(x), y, reduction="none")
    return (each * w).sum() / w.sum(), w.sum()


class Tagger(nn.Module):
    """A label for each position of sequences that come time first."""

    def __init__(self, width=8):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(12, width), nn.GRU(width, width), nn.Linear(width, 5)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


class Lines(torch.utils.data.Dataset):
    def __init__(self, n):
        self.lines = [torch.randint(1, 12, (2 + i % 5,)) for i in range(n)]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        return self.lines[i], self.lines[i] % 5


def time_first(samples):
    x, y = zip(*samples, strict=True)
    return pad_sequence(list(x)), pad_sequence(list(y), padding_value=-100)


def tagger_step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100), (y != -100).sum()


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(12, 8), nn.LSTM(8, 8), nn.Linear(8, 5)

    def forward(self, packed):
        embedded = torch.nn.utils.rnn.PackedSequence(
            self.embed(packed.data), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        return self.head(pad_packed_sequence(self.rnn(embedded)[0])[0])


def packed(samples):
    x, y = zip(*samples, strict=True)
    return pack_sequence(list(x), enforce_sorted=False), pad_sequence(list(y), padding_value=-100)


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8), nn.Linear(8, 5)

    def forward(self, frames):
        return self.head(self.rnn(frames)[0]).log_softmax(-1)


def speech(n):
    return torch.randn(n, 9, 3), torch.randint(1, 5, (n, 3)), torch.arange(n) % 3 + 1


def ctc_step(model, batch):
    frames, words, lengths = batch
    log_p = model(frames.transpose(0, 1))
    full = torch.full((len(frames),), log_p.shape[0])
    return F.ctc_loss(log_p, words, full, lengths, reduction="sum") / len(frames)


class Pictures(torch.utils.data.Dataset):
    """Each has its own size."""

    def __init__(self, n):
        self.pictures = [(torch.randn(1, 4 + i % 3, 5 + i % 2), i % 4) for i in range(n)]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.pictures[i]


class AnySize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, pictures):
        return self.head(torch.stack([torch.relu(self.conv(p[None])).mean((2, 3))[0] for p in pictures]))


def as_tuples(samples):
    return tuple(zip(*samples, strict=True))


def pictures_step(model, batch):
    pictures, labels = batch
    return F.cross_entropy(model(pictures), torch.tensor(labels))


class Records(torch.utils.data.Dataset):
    def __init__(self, n):
        x, self.y = torch.randn(n, 6), torch.randint(0, 4, (n,))
        self.x = {"left": x[:, :3], "right": {"top": x[:, 3:5], "bottom": x[:, 5:]}}

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        right = {name: value[i] for name, value in self.x["right"].items()}
        return {"x": {"left": self.x["left"][i], "right": right}, "y": self.y[i], "name": f"record {i}"}


def nested_step(model, batch):
    x = batch["x"]
    both = torch.cat([x["left"], x["right"]["top"], x["right"]["bottom"]], dim=1)
    return F.cross_entropy(model(both), batch["y"])


def views(n):
    x = torch.randn(n, 6)
    return x, x + 0.1 * torch.randn(n, 6), torch.randint(0, 3, (n,))


def both_views(model, batch):
    return F.normalize(model(torch.cat(batch[:2])), dim=-1).chunk(2)


def nt_xent(model, batch):
    """SimCLR: every other view of the batch is a negative."""
    z = torch.cat([nbdist.gather(view) for view in both_views(model, batch)])
    similarity = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def in_batch_negatives(model, batch):
    """As those of sentence encoders: a query's own rows only, all documents."""
    query, document = both_views(model, batch)
    ids = torch.arange(len(query)) + (nbdist.gather(batch[0][:, :1]) == batch[0][0, 0]).double().argmax()
    return F.cross_entropy(query @ nbdist.gather(document).T / 0.1, ids)


def supervised_contrast(model, batch):
    z, labels = nbdist.gather(F.normalize(model(batch[0]), dim=-1)), nbdist.gather(batch[2])
    apart = ~torch.eye(len(z), dtype=torch.bool)
    log_p = (z @ z.T / 0.5).masked_fill(~apart, -1e9).log_softmax(1)
    same = (labels[:, None] == labels) & apart
    return -((log_p * same).sum(1) / same.sum(1).clamp(min=1)).mean()


def vicreg(model, batch):
    first, second = (nbdist.gather(view) for view in both_views(model, batch))
    spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (first, second))
    centred = first - first.mean(0)
    covariance = (centred.T @ centred / (len(first) - 1)).fill_diagonal_(0).square().sum()
    return F.mse_loss(first, second) + spread + 0.1 * covariance


def hardest_triplets(model, batch):
    z, labels = nbdist.gather(model(batch[0])), nbdist.gather(batch[2])
    distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    return F.relu(distance.where(same, 0).amax(1) - distance.where(~same, 1e9).amin(1) + 1).mean()


def sum_of_squares(model, batch):
    return (model(batch[0]) - F.one_hot(batch[1], 4)).square().sum()


CASES = {
    "ignored class, by a partial": Case(
        make=mlp,
        data=uneven,
        loss=functools.partial(F.cross_entropy, ignore_index=0),
        split_at="2",
        weigh=lambda batch: (batch[1] != 0).sum().item(),
    ),
    "label smoothing, class weights": Case(
        make=mlp,
        data=classes,
        split_at="2",
        loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64), label_smoothing=0.1),
        weigh=lambda batch: torch.tensor([1.0, 2.0, 3.0, 0.5])[batch[1]].sum().item(),
    ),
    "focal loss": Case(make=mlp, data=classes, loss=focal, split_at="2"),
    "dice of each sample": Case(make=mlp, data=classes, loss=dice, split_at="2"),
    "quantiles": Case(
        make=lambda: mlp(3), data=lambda n: (torch.randn(n, 6), torch.randn(n)), loss=pinball, split_at="2"
    ),
    "masked errors": Case(
        make=mlp,
        split_at="2",
        step=masked_mse,
        weigh=lambda batch: batch[2].sum().item(),
        data=lambda n: (torch.randn(n, 6), torch.randn(n, 4), (torch.rand(n, 4) < 0.6).float()),
    ),
    "weights of samples": Case(
        make=mlp,
        data=lambda n: (*classes(n), torch.rand(n) + 0.1),
        step=weighted,
        split_at="2",
        weigh=lambda batch: batch[2].sum().item(),
    ),
    "time first": Case(
        make=Tagger,
        step=tagger_step,
        split_at="head",
        weigh=lambda batch: (batch[1] != -100).sum().item(),
        data=lambda n: DataLoader(Lines(n), batch_size=12, collate_fn=time_first),
    ),
    "packed, time first": Case(
        make=Packed,
        step=tagger_step,
        weigh=lambda batch: (batch[1] != -100).sum().item(),
        data=lambda n: DataLoader(Lines(n), batch_size=12, collate_fn=packed),
    ),
    "CTC": Case(make=Frames, data=speech, step=ctc_step, split_at="head"),
    "pictures of many sizes": Case(
        make=AnySize,
        data=lambda n: DataLoader(Pictures(n), batch_size=12, collate_fn=as_tuples),
        step=pictures_step,
        double=False,
    ),
    "nested dicts": Case(
        make=mlp, data=lambda n: DataLoader(Records(n), batch_size=12), step=nested_step, double=False, split_at="2"
    ),
    "a sum": Case(make=mlp, data=classes, step=sum_of_squares, reduction="sum", lr=0.002, split_at="2"),
    "a sum, by name": Case(make=mlp, data=classes, loss="cross_entropy", reduction="sum", lr=0.005, split_at="2"),
    "SimCLR, gathered": Case(make=mlp, data=views, step=nt_xent, split_at="2"),
    "in-batch negatives, gathered": Case(make=mlp, data=views, step=in_batch_negatives, split_at="2"),
    "supervised contrast, gathered": Case(make=mlp, data=views, step=supervised_contrast, split_at="2"),
    "VICReg, gathered": Case(make=mlp, data=views, step=vicreg, split_at="2"),
    "hardest triplets, gathered": Case(make=mlp, data=views, step=hardest_triplets, split_at="2"),
}
