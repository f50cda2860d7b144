"""Kinds of training: what happens around the steps, on a small model, and the same written as a plain loop."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from problems import CLASSES, FEATURES, SGD, classes, mlp, train, train_task, weights
from torch.nn import functional as F
from torch.optim import lr_scheduler

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.rehearsal import rehearse
from nbdist.core.task.task import Task
from nbdist.plan import Plan

EPOCHS, BATCH = 4, 8
TRAIN, VAL = classes(20), classes(11)  # the last batch has 4 samples
HELD = classes(3)[0]


def mesh_options(mesh: str) -> dict[str, Any]:
    """What a mesh needs; a pipeline is cut where it is told, since measured times need not repeat."""
    return {"strategy": mesh} | ({"microbatches": 2, "split_at": ["1"]} if "pp" in mesh else {})


def options_of(mesh: str) -> dict[str, Any]:
    """Those that all have, but for what a row says otherwise."""
    return {"optimizer": SGD, "batch_size": BATCH, "shuffle": False, "epochs": EPOCHS, "seed": 3, **mesh_options(mesh)}


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    """The mean of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def mean_over(model: Any, data: Any, value: Callable[[Any, Any], torch.Tensor]) -> float:
    """A mean over samples, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        mean = float(value(model, data))
    model.train()
    return mean


def plain(
    model: Any, epochs: int = EPOCHS, *, data: Any = TRAIN, optimizer: Any = None,
    loss: Callable[[Any, Any], torch.Tensor] = loss_of,
    stepped: Callable[[], Any] = lambda: None, ended: Callable[[], Any] = lambda: None,
) -> list[float]:  # fmt: skip
    """A loop in plain PyTorch over all samples; the mean loss of each epoch, of which the last makes `ended` true."""
    optimizer, history = optimizer or SGD(model.parameters()), []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.arange(len(data[0])).split(BATCH):
            optimizer.zero_grad()
            mean = loss(model, (data[0][rows], data[1][rows]))
            mean.backward()
            optimizer.step()
            stepped()
            total += mean.item() * len(rows)
        history.append(total / len(data[0]))
        if ended():
            break
    return history


def column(history: list[dict[str, Any]], name: str) -> list[float]:
    """A number of each epoch."""
    return [row[name] for row in history]


# Rates by steps, by epochs, by what is measured.


def by_steps(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=3 * EPOCHS)


def by_epochs(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def by_loss(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.05)


def scheduled(world: World, mesh: str, make: Any, **options: Any) -> dict[str, Any]:
    result, trained = train(world, mlp(), TRAIN, lr_scheduler=make, **options_of(mesh), **options)
    return {"loss": column(result.history, "loss"), **trained}


def plainly_scheduled(make: Any, when: str) -> dict[str, Any]:
    model = mlp()
    optimizer = SGD(model.parameters())
    scheduler = make(optimizer)
    steps = {
        "step": {"stepped": scheduler.step},
        "epoch": {"ended": scheduler.step},
        "value": {"ended": lambda: scheduler.step(mean_over(model, VAL, loss_of))},
    }
    return {"loss": plain(model, optimizer=optimizer, **steps[when]), **weights(model)}


# A step's own numbers, and those of an evaluation.


def logging_step(model, batch):
    x, y = batch
    output = model(x)
    return F.cross_entropy(output, y), {"right": (output.argmax(1) == y).double().mean(), "size": output.abs().mean()}


class Recall:
    """How many samples of class 1 are found, as a metric object."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.found = self.all = 0

    def update(self, output, y):
        self.found += int(((output.argmax(1) == 1) & (y == 1)).sum())
        self.all += int((y == 1).sum())

    def compute(self):
        return self.found / self.all


recall = Recall()


def evaluation(model, batch):
    x, y = batch
    output = model(x)
    recall.update(output, y)
    return {"size": output.abs().mean(), "recall": recall}


def measured(world: World, mesh: str) -> dict[str, Any]:
    result, trained = train(world, mlp(), TRAIN, step=logging_step, val=VAL, evaluate=evaluation, **options_of(mesh))
    names = ["loss", "right", "size", "val_size", "val_recall"]
    return {name: column(result.history, name) for name in names} | trained


def plainly_measured() -> dict[str, Any]:
    model, found = mlp(), {name: [] for name in ("right", "size", "val_size", "val_recall")}
    totals = {"right": 0.0, "size": 0.0}

    def loss(model, batch):
        value, log = logging_step(model, batch)
        for name, number in log.items():
            totals[name] += number.item() * len(batch[0]) / len(TRAIN[0])
        return value

    def ended():
        for name in totals:
            found[name].append(totals[name])
            totals[name] = 0.0
        found["val_size"].append(mean_over(model, VAL[0], lambda model, x: model(x).abs().mean()))
        hits = model(VAL[0]).argmax(1)[VAL[1] == 1] == 1
        found["val_recall"].append(hits.double().mean().item())

    return {"loss": plain(model, loss=loss, ended=ended), **found, **weights(model)}


# At the end of an epoch.


class Watching:
    """Keeps the outputs for the same samples, and ends the run after three epochs."""

    def __init__(self):
        self.outputs = []

    def __call__(self, model, row):
        self.outputs.append(model(HELD))
        return row["epoch"] == 3


def watched(world: World, mesh: str) -> dict[str, Any]:
    each = Watching()
    result, trained = train(world, mlp(), TRAIN, each_epoch=each, **options_of(mesh))
    return {"loss": column(result.history, "loss"), "outputs": each.outputs, **trained}  # on rank 0 alone


def plainly_watched() -> dict[str, Any]:
    model, outputs = mlp(), []

    def ended():
        with torch.no_grad():
            outputs.append(model(HELD))
        return len(outputs) == 3

    return {"loss": plain(model, ended=ended), "outputs": outputs, **weights(model)}


UNEVEN = functools.partial(torch.optim.SGD, lr=3.0)  # its best epoch is not its last


def best(world: World, mesh: str) -> dict[str, Any]:
    options = options_of(mesh) | {"optimizer": UNEVEN, "epochs": 9}
    result, trained = train(world, mlp(), TRAIN, val=VAL, keep_best="val_loss", early_stop="val_loss:2", **options)
    return {"val_loss": column(result.history, "val_loss"), **trained}


def plainly_best() -> dict[str, Any]:
    model, losses, kept = mlp(), [], []

    def ended():
        losses.append(mean_over(model, VAL, loss_of))
        kept.append(weights(model))
        return len(losses) - 1 - losses.index(min(losses)) == 2

    plain(model, 9, optimizer=UNEVEN(model.parameters()), ended=ended)
    assert 2 < len(losses) < 9
    return {"val_loss": losses, **kept[losses.index(min(losses))]}


# Several runs in a row.


def freeze(model, frozen):
    for parameter in model[0].parameters():
        parameter.requires_grad_(not frozen)


def thawed(world: World, mesh: str) -> dict[str, Any]:
    model, found = mlp(), []
    for frozen in (True, False):
        freeze(model, frozen)
        result, trained = train(world, model, TRAIN, **options_of(mesh))
        found += column(result.history, "loss")
    return {"loss": found, **trained}


def plainly_thawed() -> dict[str, Any]:
    model, found = mlp(), []
    for frozen in (True, False):
        freeze(model, frozen)
        found += plain(model, optimizer=SGD([p for p in model.parameters() if p.requires_grad]))
    return {"loss": found, **weights(model)}


def rehearsed(world: World, mesh: str) -> dict[str, Any]:
    options = options_of(mesh)
    supplied = {name: options.pop(name) for name in ("optimizer", "batch_size", "shuffle")}
    task = Task.create(mlp(), TRAIN, loss="cross_entropy", val=VAL, each_epoch=Watching(), **supplied)
    plan = Plan.create(ranks=world.size, cores=1, threads=1, rehearse=True, **options, **task.options)
    rehearse(task, plan, world)
    result = train_task(world, task, **options)
    return {"loss": column(result.history, "loss"), **weights(task.model)}


def after_a_rehearsal() -> dict[str, Any]:
    found = plainly_watched()
    return {name: value for name, value in found.items() if name != "outputs"}


# A step that plays episodes.


def play(model, state, moves):
    """Three moves from each state on: what they bring, and how likely they are, each `(states,)`."""
    reward, likely = 0.0, 0.0
    for move in moves.unbind(1):
        likely = likely + F.log_softmax(model(state), 1).gather(1, move[:, None])[:, 0]
        state = (state + 0.1 * F.one_hot(move, FEATURES)).tanh()
        reward = reward + state.sum(1)
    return reward, likely


def advantage(reward, rewards):
    return (reward - rewards.mean()) / rewards.std()


def playing_step(model, batch):
    reward, likely = play(model, *batch)
    return -(advantage(reward, nbdist.gather(reward)) * likely).mean(), {"reward": reward.mean()}


def episodes():
    """States, and the moves from each on, which are data here: a plain loop would draw other random numbers."""
    return TRAIN[0], torch.randint(CLASSES, (len(TRAIN[0]), 3), generator=torch.Generator().manual_seed(2))


def played(world: World, mesh: str) -> dict[str, Any]:
    options = options_of(mesh) | ({"microbatches": 1} if "pp" in mesh else {})
    result, trained = train(world, mlp(), episodes(), step=playing_step, **options)
    return {"loss": column(result.history, "loss"), "reward": column(result.history, "reward"), **trained}


def plainly_played() -> dict[str, Any]:
    model, rewards = mlp(), []

    def loss(model, batch):
        reward, likely = play(model, *batch)
        rewards.append(reward.sum().item() / len(TRAIN[0]))
        return -(advantage(reward, reward) * likely).mean()

    found = plain(model, data=episodes(), loss=loss)
    return {
        "loss": found,
        "reward": torch.tensor(rewards, dtype=torch.float64).view(EPOCHS, -1).sum(1),
        **weights(model),
    }


# Notebooks.

BEFORE = """\
import nbdist
import torch
from torch import nn

%load_ext nbdist
%dist_start -n RANKS --device cpu
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 3)).double()
generator = torch.Generator().manual_seed(1)
points = torch.randn(20, 6, generator=generator, dtype=torch.float64)
labels = torch.randint(3, (20,), generator=generator)
"""
LINE = "%dist_train net (points, labels) --loss cross_entropy --optimizer torch.optim.SGD --shuffle no"
SWEEP = f"""\
class cfg:
    epochs, batch = 4, 8

start = {{name: tensor.clone() for name, tensor in net.state_dict().items()}}
runs, found = {{}}, {{}}
for rate in (0.05, 0.5):
    net.load_state_dict(start)
    runs[rate] = {LINE} --lr rate/2 --epochs cfg.epochs --batch-size cfg.batch MESH
    found |= {{f"{{name}} at {{rate}}": tensor.clone() for name, tensor in net.state_dict().items()}}
compared = nbdist.compare(runs).to_frame()
found |= {{"loss": compared["loss"].tolist(), "lr": compared["lr"].tolist()}}
%dist_stop
"""
EXPORT = f"""\
{LINE} --lr 0.05 --epochs 4 --batch-size 8 MESH
%dist_export train.py
%dist_stop
"""
LAUNCH = """\
import subprocess, sys
launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "RANKS", "train.py"]
ended = subprocess.run(launched, capture_output=True, text=True)
assert ended.returncode == 0, ended.stderr
found = torch.load("train.trained.pt")
assert all(torch.equal(tensor, found[name]) for name, tensor in net.state_dict().items())
"""


def in_notebook(cells: list[str], ranks: int, mesh: str) -> dict[str, Any]:
    """What cells find in a notebook of their own, with so many engines."""
    line = " ".join(
        f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in mesh_options(mesh).items()
    )
    texts = [cell.replace("RANKS", str(ranks)).replace("MESH", line) for cell in cells]
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(Path(__file__).parent / "run_cells.py"), f"{folder}/found.pt"]
        ended = subprocess.run(
            program, input=json.dumps(texts), capture_output=True, text=True, check=False,
            env=os.environ | {"NBDIST_HOME": folder},
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(ended.stderr.strip().splitlines()[-1])
        return torch.load(f"{folder}/found.pt")


def plainly_swept() -> dict[str, Any]:
    found, losses = {}, []
    for rate in (0.05, 0.5):
        model = mlp()
        losses.append(min(plain(model, optimizer=torch.optim.SGD(model.parameters(), lr=rate / 2))))
        found |= {f"{name} at {rate}": tensor for name, tensor in weights(model).items()}
    return found | {"loss": losses, "lr": [0.025, 0.25]}


def plainly_exported() -> dict[str, Any]:
    model = mlp()
    plain(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    return weights(model)


class Training(NamedTuple):
    """A row.

    Args:
        by_hand: What plain PyTorch finds: numbers and tensors by name.
        run: ``run(world, mesh)``: the same on a rank.
        cells: In place of it: cells that leave it in `found`, in a notebook with engines.
    """

    by_hand: Callable[[], dict[str, Any]]
    run: Callable[[World, str], dict[str, Any]] | None = None
    cells: list[str] | None = None


CASES = {
    "a rate by steps": Training(
        lambda: plainly_scheduled(by_steps, "step"), functools.partial(scheduled, make=by_steps)
    ),
    "a rate by epochs": Training(
        lambda: plainly_scheduled(by_epochs, "epoch"),
        functools.partial(scheduled, make=by_epochs, schedule_by="epoch"),
    ),
    "a rate by val_loss": Training(
        lambda: plainly_scheduled(by_loss, "value"), functools.partial(scheduled, make=by_loss, val=VAL)
    ),
    "numbers and objects that are measured": Training(plainly_measured, measured),
    "a function after each epoch": Training(plainly_watched, watched),
    "the best epoch, an early stop": Training(plainly_best, best),
    "layers frozen, then thawed": Training(plainly_thawed, thawed),
    "a rehearsal before": Training(after_a_rehearsal, rehearsed),
    "episodes, advantages of a batch": Training(plainly_played, played),
    "rates of a loop, compared": Training(plainly_swept, cells=[BEFORE, SWEEP]),
    "exported, under torchrun": Training(plainly_exported, cells=[BEFORE, EXPORT, LAUNCH]),
}
