"""A module that says itself how it is trained, as those of Lightning do, trains by one line: as a plain loop does."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from problems import classes, seeded, train_task
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

DATA, VAL = classes(40), classes(22)
OPTIONS = {"batch_size": 8, "shuffle": False, "epochs": 2}


class Right(nn.Module):
    """A metric over all batches, as those of torchmetrics are."""

    def __init__(self):
        super().__init__()
        self.right = self.seen = 0

    def reset(self):
        self.right = self.seen = 0

    def update(self, scores, y):
        self.right += int((scores.argmax(1) == y).sum())
        self.seen += len(y)

    def compute(self):
        return self.right / self.seen


class Classifier(nn.Module):
    """With the methods of a LightningModule."""

    automatic_optimization = True

    def __init__(self, lr=0.05):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.right = Right()
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def log(self, name, value, **options):
        raise RuntimeError("no trainer")

    def log_dict(self, values, **options):
        raise RuntimeError("no trainer")

    def training_step(self, batch, batch_idx):
        loss = self.loss_of(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def loss_of(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        self.right.update(scores, y)
        self.log_dict({"val_loss": F.cross_entropy(scores, y), "val_right": self.right})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Scheduled(Classifier):
    def training_step(self, batch):
        return {"loss": self.loss_of(batch)}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Listed(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def plain(kind, by):
    """The loop of one process; weights, and loss and share of right answers on the validation data."""
    model = seeded(kind, torch.float64)
    made = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = {
        "": None, "step": torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=10) if by == "step" else None,
        "epoch": torch.optim.lr_scheduler.StepLR(made, 1, 0.5) if by == "epoch" else None,
    }[by]  # fmt: skip
    measured = []
    for _ in range(2):
        for x, y in zip(*(part.split(8) for part in DATA), strict=True):
            made.zero_grad()
            F.cross_entropy(model(x), y).backward()
            made.step()
            if by == "step":
                scheduler.step()
        if by == "epoch":
            scheduler.step()
        with torch.no_grad():
            scores = model(VAL[0])
        measured.append((F.cross_entropy(scores, VAL[1]).item(), (scores.argmax(1) == VAL[1]).double().mean().item()))
    return model.state_dict(), measured


def run(world, kind, options):
    model = seeded(kind, torch.float64)
    task, plan_options = Task.of_options(model, DATA, {"val": VAL, **OPTIONS})
    plan_options |= options
    return train_task(
        world, task, **{k: v for k, v in plan_options.items() if k not in task.options}
    ), model.state_dict()


@pytest.mark.parametrize("mesh", ["dp=1", "dp=2", "shard=2", "dp=2,shard=2"])
@pytest.mark.parametrize(("kind", "by"), [(Classifier, ""), (Scheduled, "step"), (Listed, "epoch")])
def test_one_line_trains_it(run_ranks, mesh, kind, by):
    """Its own step, optimizer, scheduler, evaluation and numbers."""
    weights, measured = plain(kind, by)
    size = math.prod(map(int, re.findall(r"\d", mesh)))
    for result, trained in run_ranks(size, run, kind, {"strategy": mesh}):
        torch.testing.assert_close(trained, weights, rtol=1e-10, atol=1e-12)
        for row, (loss, right) in zip(result.history, measured, strict=True):
            assert (row["val_loss"], row["val_right"]) == pytest.approx((loss, right), rel=1e-10)
            if kind is not Scheduled:
                assert row["train_loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_on_engines_the_notebooks_own_module_is_trained(cluster):
    """And nothing of the run stays in it."""
    model = seeded(Scheduled, torch.float64)
    cluster.train(model, DATA, val=VAL, **OPTIONS)
    torch.testing.assert_close(model.state_dict(), plain(Scheduled, "step")[0], rtol=1e-10, atol=1e-12)
    assert "log" not in vars(model)


def test_what_the_user_gives_counts():
    """An optimizer, a loss, a step of one's own."""
    model = seeded(Listed, torch.float64)
    task, options = Task.of_options(model, DATA, {"optimizer": "adam", "lr": 0.1, "loss": "cross_entropy", **OPTIONS})
    assert ("adam", "cross_entropy", {}) == (options["optimizer"], options["loss"], task.schedulers)


class ByHand(Classifier):
    automatic_optimization = False


class Hooked(Classifier):
    def on_train_epoch_end(self):
        pass


class OfTrainer(Classifier):
    def training_step(self, batch, batch_idx):
        return self.loss_of(batch) * self.weight()

    def weight(self):
        return 1 / (1 + self.current_epoch)


class Pair(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.SGD(self.net[2].parameters(), lr=0.1)


class Odd(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_f1"}}


class LogsAnObject(Classifier):
    def training_step(self, batch, batch_idx):
        self.log("right", self.right)
        return self.loss_of(batch)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (ByHand, r"optimizes by hand \(automatic_optimization=False\): write the step, and call nbdist\.update"),
        (Hooked, r"Hooked has on_train_epoch_end, which Lightning's trainer calls and nbdist does not"),
        (OfTrainer, r"training_step of OfTrainer uses self\.current_epoch.*nbdist\.current_step\(\)"),
        (Pair, r"configure_optimizers of Pair gives 2 optimizers: for one loss give one"),
        (Odd, r"scheduler of Odd monitors val_f1, and nbdist gives it val_loss"),
        (LogsAnObject, r"training_step logs right as an object that accumulates.*self\.log\('right', self\.right\("),
    ],
)
def test_what_needs_lightnings_trainer_is_refused(kind, words):
    """In one sentence, before an engine is touched where that can be known."""
    with pytest.raises(TaskError, match=words):
        nbdist.train(seeded(functools.partial(kind), torch.float64), DATA, verbose=False, check="no", **OPTIONS)
