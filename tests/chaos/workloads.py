"""Workloads of the chaos suite: one for each way to save, share and read state."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from traps import Rates, Traps

import nbdist
from nbdist.core.params.weight_copies import COPIES
from nbdist.core.state.checkpoint_reader import CheckpointReader

STEPS = 20
SAMPLES, BATCH, FEATURES, CLASSES = 600, 60, 40, 5
WIDTHS = {
    "shared weights": 300,
    "replicas": 64,
    "own optimizer": 48,
    "stream": 48,
    "two optimizers": 64,
    "carried values": 64,
    "30 MiB": 1550,
}
WORKLOADS = tuple(WIDTHS)[:4]
MESHES = (
    "shard=4", "pp=4", "tp=4", "dp=2,shard=2", "dp=2,pp=2", "dp=2,tp=2", "shard=2,pp=2", "shard=2,tp=2", "pp=2,tp=2",
)  # fmt: skip
"""Workloads, too: a model in parts, on four ranks."""


class Net(nn.Module):
    """Two hidden layers, BatchNorm and dropout, with a trap before each half of a step."""

    def __init__(self, width: int, traps: Traps) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES),
        )  # fmt: skip
        self.traps = traps

    def forward(self, x):
        """Scores of classes."""
        self.traps.reach("forward" if self.training else "evaluation")
        scores = self.layers(x)
        if scores.requires_grad:
            scores.register_hook(lambda _: self.traps.reach("backward"))
        return scores


class Rows(Dataset):
    """A map-style data set."""

    def __init__(self, traps: Traps) -> None:
        self.traps = traps
        self.x, self.y = rows(SAMPLES)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.traps.reach("data", index)
        return self.x[index], self.y[index]


class Stream(IterableDataset):
    """The same rows as a stream."""

    def __init__(self, traps: Traps) -> None:
        self.traps = traps

    def __iter__(self):
        for index, row in enumerate(zip(*rows(SAMPLES), strict=True)):
            self.traps.reach("data", index)
            yield row


def rows(samples: int, seed: int = 1):
    """Random samples and classes, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, FEATURES, generator=generator), torch.randint(CLASSES, (samples,), generator=generator)


def logging_step(model, batch):
    """A step with numbers of its own."""
    x, y = batch
    scores = model(x)
    loss = nn.functional.cross_entropy(scores, y)
    return loss, {"right": (scores.argmax(1) == y).double().mean(), "spread": scores.detach().double().std(1).mean()}


def updating_step(model, batch):
    """A step that updates by one optimizer, and then by the other."""
    x, y = batch
    nbdist.update(nn.functional.cross_entropy(model(x), y), "back")
    nbdist.update(nn.functional.cross_entropy(model(x), y) + model(x).square().mean(), "front")


def carrying_step(model, batch):
    """A step that keeps a mean of its scores, and a generator, from batch to batch and from epoch to epoch."""
    x, y = batch
    state = nbdist.carried(over_epochs=True, mean=torch.zeros(CLASSES), rng=None)
    generator = torch.Generator()
    if state.rng is not None:
        generator.set_state(state.rng)
    scores = model(x + 0.1 * torch.randn(x.shape, generator=generator))
    state.mean, state.rng = 0.9 * state.mean + 0.1 * scores.detach().mean(0), generator.get_state()
    return nn.functional.cross_entropy(scores - state.mean, y)


class Right:
    """How many predictions are right, as an object that batches update."""

    def __init__(self) -> None:
        self.reset()

    def reset(self):
        """Forget all."""
        self.right = self.seen = 0

    def update(self, predicted, y):
        """Add a batch."""
        self.right += int((predicted == y).sum())
        self.seen += len(y)

    def compute(self):
        """Their share."""
        return self.right / self.seen


right = Right()


def judge(model, batch):
    """An evaluation of one's own."""
    x, y = batch
    scores = model(x)
    right.update(scores.argmax(1), y)
    return {"loss": nn.functional.cross_entropy(scores, y), "right": right}


def jittered(model):
    """Random weights after each step, the same on every rank."""
    model.layers[0].weight += 1e-3 * torch.randn_like(model.layers[0].weight)


def shown(model, row):
    """Draws random numbers between two epochs."""
    torch.rand(3)


def make(name: str, traps: Traps) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model, data and options of a workload of 20 steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(WIDTHS.get(name, 64), traps)
    options: dict[str, Any] = {
        "loss": "cross_entropy", "epochs": 2, "batch_size": BATCH, "val": rows(90, 2), "metric": "accuracy",
        "lr_scheduler": Rates(traps), "seed": 3,
    }  # fmt: skip
    data: Any = rows(SAMPLES)
    if name in MESHES:
        model = model.layers  # no trap in what is cut into stages
        options |= {"strategy": name, "ema": 0.9} | ({"keep_best": "val_loss"} if "dp=2" in name else {})
    elif name == "shared weights":
        options |= {"ema": 0.9, "each_epoch": shown}
    elif name == "replicas":
        data = rows(SAMPLES - 11)  # a last batch that is not like the others
        del options["loss"]
        options |= {"clip_norm": 1.0, "accumulate": 2, "step": logging_step, "after_step": jittered}
    elif name == "own optimizer":
        first, *others = model.parameters()
        options["optimizer"] = torch.optim.AdamW([{"params": [first], "lr": 0.002}, {"params": others}], lr=0.001)
        data = DataLoader(Rows(traps), batch_size=BATCH, shuffle=True, num_workers=1)
        del options["batch_size"]
    elif name == "two optimizers":
        front, *back = model.layers.children()
        optimizers = {"front": front.parameters(), "back": nn.Sequential(*back).parameters()}
        options["optimizer"] = {part: torch.optim.AdamW(own, lr=0.002) for part, own in optimizers.items()}
        del options["loss"], options["metric"]
        options |= {"step": updating_step, "evaluate": judge, "lr_scheduler": {"front": Rates(traps)}, "ema": 0.9}
    elif name == "carried values":
        del options["loss"], options["metric"]
        options |= {"step": carrying_step, "evaluate": judge, "shuffle": True, "check": "mesh"}
    elif name == "stream":
        options["optimizer"] = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
        del options["metric"]
        options["evaluate"] = judge
        data = Stream(traps)
    return model, data, options


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """The SHA-256 of tensors, their names included."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def optimizer_digest(run: Any, options: dict[str, Any]) -> str:
    """The SHA-256 of the optimizer's state after a run: in the notebook, on disk, or in the last snapshot."""
    optimizer = options.get("optimizer")
    if isinstance(optimizer, torch.optim.Optimizer):
        state = optimizer.state_dict()
        groups = json.dumps(state["param_groups"])
        tensors = {f"{i} {key}": value for i, entry in state["state"].items() for key, value in entry.items()}
        return digest({**tensors, groups: torch.ones(1)})
    saved = CheckpointReader.in_folder(options["checkpoint"]) if "checkpoint" in options else kept(run)
    groups = {name: settings["groups"] for name, settings in saved.optimizers.items()}
    values = json.dumps([saved.values, groups], sort_keys=True)
    tensors = {f"{name} {entry}": saved.whole(name, entry) for name in saved.names for entry in saved.entries(name)}
    for entry in COPIES:
        tensors |= {f"{name} {entry}": saved.whole(name, entry) for name in saved.copies(entry)}
    for name in saved.names:  # buffers that other ranks have alike count once, however many they are at the end
        for entry in saved.entries(name):
            if entry.startswith("@") and torch.equal(saved.whole(name), tensors[f"{name} {entry}"]):
                del tensors[f"{name} {entry}"]
    return digest({**tensors, values: torch.ones(1)})


def kept(run: Any) -> CheckpointReader:
    """The last snapshot of a run."""
    snapshot = CheckpointReader.of_snapshot(run.control.snapshot_store.paths)
    assert snapshot is not None, "no snapshot was kept"
    return snapshot


def history(run: Any) -> list[dict[str, Any]]:
    """The history of a run, without its seconds."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.history]
