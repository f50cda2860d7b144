"""Data in the forms that people give it, each beside a plain loop over the same batches."""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import sqlite3
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import rnn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, get_worker_info

SAMPLES, FEATURES, BATCH = 34, 6, 12
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(SAMPLES, FEATURES, generator=GENERATOR, dtype=torch.float64)
Y = X.sum(1, keepdim=True).tanh()
LENGTHS = torch.randint(1, 9, (SAMPLES,), generator=GENERATOR).tolist()


def of_pair(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def of_dict(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


def of_object(model, batch):
    return (model(batch.x) - batch.y).square().mean()


def of_lists(model, batch):
    """Images of different sizes, each with its own target."""
    return torch.stack([(model(x).mean() - t["y"]).square().mean() for x, t in zip(*batch, strict=True)]).mean()


def of_sequences(model, batch):
    """Padded to the longest of the batch; a mean over samples, so that padding does not count."""
    x, lengths, y = batch
    outputs = [model(one[:length]).mean(0) for one, length in zip(x, lengths.tolist(), strict=True)]
    return (torch.stack(outputs) - y).square().mean()


@dataclass(frozen=True)
class SourceCase:
    """A form of data.

    Args:
        make: Makes it, anew each time.
        step: The training step.
        plain: The batches of an epoch in a plain loop over what `make` returns; by default it is iterated.
        options: Of nbdist.
        steps: How many steps a plain loop does; by default two epochs.
    """

    make: Callable[[], Any]
    step: Callable[[nn.Module, Any], Any] = of_pair
    plain: Callable[[Any], Any] = iter
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


def slabs(_data=None, sizes=None):
    """The samples in order, as batches of these sizes."""
    return list(zip(X.split(sizes or BATCH), Y.split(sizes or BATCH), strict=True))


def dicts(_data=None):
    return [{"x": x, "y": y} for x, y in slabs()]


class Rows(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return X[i], Y[i]


class DictRows(Rows):
    def __getitem__(self, i):
        return {"x": X[i], "y": Y[i], "name": f"row {i}"}


class ByName(Dataset):
    """Samples by name."""

    def __init__(self):
        self.rows = {f"row {i}": (X[i], Y[i]) for i in range(SAMPLES)}

    def __len__(self):
        return SAMPLES

    def __getitem__(self, name):
        return self.rows[name]


class Names(Sampler):
    def __iter__(self):
        return (f"row {(5 * i) % SAMPLES}" for i in range(SAMPLES))


class Pairs(Dataset):
    """Samples by a pair of numbers."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, pair):
        i, scale = pair
        return X[i] * scale, Y[i]


class OfPairs(Sampler):
    """Has an own generator, and a length."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return ((i, 1.0 + i / 50) for i in torch.randperm(SAMPLES, generator=self.generator).tolist())


class Sequences(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return X[i].repeat(LENGTHS[i], 1), Y[i]


def padded(samples):
    x, y = zip(*samples, strict=True)
    return rnn.pad_sequence(x, batch_first=True), torch.tensor(list(map(len, x))), torch.stack(y)


class Buckets(Sampler):
    """Batches of similar lengths, and so of different sizes; another order in each epoch, from its own generator."""

    def __init__(self, tokens=30):
        self.tokens, self.generator = tokens, torch.Generator().manual_seed(1)

    def __iter__(self):
        batches, batch = [], []
        for i in sorted(range(SAMPLES), key=LENGTHS.__getitem__):
            if batch and LENGTHS[i] * (len(batch) + 1) > self.tokens:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
        return (batches[i] for i in torch.randperm(len(batches), generator=self.generator).tolist())


class ByEpoch(Sampler):
    """Another order in each epoch that is set."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def by_epoch(loader):
    """What those who train with such a sampler do before each epoch."""
    loader.sampler.set_epoch(loader.epochs)
    loader.epochs += 1
    return loader


def informed(loader):
    loader.epochs = 0
    return loader


class Endless(Sampler):
    def __iter__(self):
        return itertools.cycle(range(SAMPLES))


class Doubled(DataLoader):
    """Changes each batch on its way."""

    def __iter__(self):
        return ((2 * x, y) for x, y in super().__iter__())


class Collating(DataLoader):
    """A subclass that reads as torch's does."""

    def __init__(self, dataset, size):
        super().__init__(
            dataset, batch_size=size, collate_fn=lambda rows: [torch.stack(c) for c in zip(*rows, strict=True)]
        )


class Batches:
    """An iterable of batches of different sizes, with a length."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter(slabs(sizes=[12, 9, 5, 8]))


class DictBatches:
    def __iter__(self):
        return iter(dicts())


class Restarting:
    """Its own iterator, which begins anew in each epoch."""

    def __iter__(self):
        self.left = dicts()
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


class Encoding(collections.UserDict):
    """A mapping that is no dict, as tokenizers give."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Encodings:
    def __iter__(self):
        return (Encoding({"x": x, "y": y, "split": "train"}) for x, y in slabs())


class Named(NamedTuple):
    x: Any
    y: Any
    texts: Any


class NamedBatches:
    def __iter__(self):
        return (Named(x, y, [f"text {i}" for i in range(len(x))]) for x, y in slabs())


@dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    source: str = "here"


class Records:
    def __iter__(self):
        return (Record(x, y) for x, y in slabs())


class Detections:
    """Tuples of images of different sizes, and of their targets."""

    def __iter__(self):
        for x, y in slabs():
            images = tuple(row.repeat(1 + i % 3, 1) for i, row in enumerate(x))
            yield images, tuple({"y": one, "boxes": torch.ones(1 + i % 2, 4)} for i, one in enumerate(y))


class Packed:
    """Batches that nobody can cut along their samples."""

    def __iter__(self):
        return (rnn.pack_sequence([row.expand(9 - i, -1) for i, row in enumerate(x[:8])]) for x, _ in slabs())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Rows()[i] for i in range(SAMPLES))


class DictStream(IterableDataset):
    def __iter__(self):
        return iter(DictRows()[i] for i in range(SAMPLES))


class Shuffling(IterableDataset):
    """Goes on with its own generator from epoch to epoch."""

    def __init__(self):
        self.generator = np.random.default_rng(4)

    def __iter__(self):
        return ((X[i], Y[i]) for i in self.generator.permutation(SAMPLES))


class OfWorkers(IterableDataset):
    """Each loading process gives its part."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return ((X[i], Y[i]) for i in range(first, SAMPLES, step))


class ByEnvironment(IterableDataset):
    """Takes the part of its rank, as `torchrun` sets it."""

    def __iter__(self):
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return ((X[i], Y[i]) for i in range(rank, SAMPLES, size))


class ByGroup(IterableDataset):
    """Takes the part of its rank, as `torch.distributed` has it; they end at different places."""

    def __iter__(self):
        there = dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        return ((X[i], Y[i]) for i in range(rank, SAMPLES, size))


class Pipeline(IterableDataset):
    """Stages behind a loader, whose batches they pass on."""

    def __init__(self):
        self.stages = [DataLoader(Stream(), batch_size=BATCH), lambda batch: (3 * batch[0], batch[1])]

    def __iter__(self):
        return map(self.stages[1], self.stages[0])


def written(owner):
    """A database and an archive with the samples, as long as there is their owner."""
    folder = Path(tempfile.mkdtemp(prefix="nbdist-sources-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    with sqlite3.connect(folder / "rows.db") as database:
        database.execute("create table rows (id integer primary key, x blob, y blob)")
        database.executemany(
            "insert into rows values (?, ?, ?)",
            [(i, X[i].numpy().tobytes(), Y[i].numpy().tobytes()) for i in range(SAMPLES)],
        )
    database.close()
    with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
        for i in range(SAMPLES):
            archive.writestr(str(i), X[i].numpy().tobytes() + Y[i].numpy().tobytes())
    return folder


class Database(Dataset):
    """Opened where it is first read."""

    def __init__(self):
        self.path, self.open = written(self) / "rows.db", None

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        if self.open is None:
            self.open = sqlite3.connect(self.path)
        x, y = self.open.execute("select x, y from rows where id = ?", (i,)).fetchone()
        return torch.from_numpy(np.frombuffer(x).copy()), torch.from_numpy(np.frombuffer(y).copy())


class Archive(Dataset):
    """The same, nested in another data set."""

    def __init__(self):
        self.path, self.cache = written(self) / "rows.zip", {}

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        if "open" not in self.cache:
            self.cache["open"] = zipfile.ZipFile(self.path)
        values = torch.from_numpy(np.frombuffer(self.cache["open"].read(str(i))).copy())
        return values[:FEATURES], values[FEATURES:]


class Frame:
    """The form of a data frame."""

    columns = ("x", "y")

    def to_numpy(self):
        return X.numpy()


SIZED = {"batch_size": BATCH, "shuffle": False}
CASES: dict[str, SourceCase] = {
    "tensors": SourceCase(lambda: (X, Y), plain=slabs, options=SIZED),
    "arrays": SourceCase(lambda: (X.numpy(), Y.numpy()), plain=slabs, options=SIZED),
    "dict of arrays": SourceCase(lambda: {"x": X.numpy(), "y": Y.numpy()}, of_dict, plain=dicts, options=SIZED),
    "list of pairs": SourceCase(lambda: [Rows()[i] for i in range(SAMPLES)], plain=slabs, options=SIZED),
    "list of dicts": SourceCase(lambda: [DictRows()[i] for i in range(SAMPLES)], of_dict, plain=dicts, options=SIZED),
    "loader of tensors": SourceCase(lambda: DataLoader(TensorDataset(X, Y), batch_size=BATCH)),
    "loader, a worker": SourceCase(lambda: DataLoader(Rows(), batch_size=BATCH, num_workers=1)),
    "loader, own collate": SourceCase(lambda: Collating(Rows(), BATCH)),
    "loader, own iter": SourceCase(lambda: Doubled(Rows(), batch_size=BATCH)),
    "loader, own iter, a worker": SourceCase(lambda: Doubled(Rows(), batch_size=BATCH, num_workers=1)),
    "loader without batch size": SourceCase(lambda: DataLoader(slabs(), batch_size=None)),
    "pipeline behind a loader": SourceCase(Pipeline),
    "batches of other sizes": SourceCase(Batches),
    "batches, dicts": SourceCase(DictBatches, of_dict),
    "batches, mappings": SourceCase(Encodings, of_object),
    "batches, named tuples": SourceCase(NamedBatches, of_object),
    "batches, dataclasses": SourceCase(Records, of_object),
    "batches, own iterator": SourceCase(Restarting, of_dict),
    "images of other sizes": SourceCase(Detections, of_lists),
    "stream": SourceCase(Stream, plain=slabs, options=SIZED),
    "stream of dicts": SourceCase(lambda: DataLoader(DictStream(), batch_size=BATCH), of_dict),
    "stream, two workers": SourceCase(lambda: DataLoader(OfWorkers(), batch_size=BATCH, num_workers=2)),
    "stream, own generator": SourceCase(lambda: DataLoader(Shuffling(), batch_size=BATCH)),
    "stream by RANK": SourceCase(lambda: DataLoader(ByEnvironment(), batch_size=BATCH), plain=slabs),
    "stream by get_rank": SourceCase(lambda: DataLoader(ByGroup(), batch_size=BATCH), plain=slabs),
    "buckets by length": SourceCase(
        lambda: DataLoader(Sequences(), batch_sampler=Buckets(), collate_fn=padded), of_sequences
    ),
    "batch sampler, a worker": SourceCase(
        lambda: DataLoader(Rows(), batch_sampler=BatchSampler(range(SAMPLES), 9, True), num_workers=1)
    ),
    "sampler of names": SourceCase(lambda: DataLoader(ByName(), batch_size=BATCH, sampler=Names())),
    "sampler of pairs": SourceCase(lambda: DataLoader(Pairs(), batch_size=BATCH, sampler=OfPairs(), drop_last=True)),
    "sampler with set_epoch": SourceCase(
        lambda: informed(DataLoader(Rows(), batch_size=BATCH, sampler=ByEpoch())), plain=by_epoch
    ),
    "sampler without an end": SourceCase(
        lambda: DataLoader(Rows(), batch_size=BATCH, sampler=Endless()), options={"steps": 7}, steps=7
    ),
    "database": SourceCase(lambda: DataLoader(Database(), batch_size=BATCH, num_workers=1)),
    "archive, nested": SourceCase(
        lambda: DataLoader(torch.utils.data.ConcatDataset([Archive()]), batch_size=BATCH), plain=slabs
    ),
    "list of batches": SourceCase(slabs),
    "list of columns": SourceCase(lambda: [X, Y]),
    "data frame": SourceCase(Frame),
    "packed sequences": SourceCase(Packed, lambda model, batch: model(batch.data).square().mean()),
}  # fmt: skip
