"""Metrics as users bring them, each with a model, data, and what plain PyTorch in one process measures.

The metrics are written for this catalogue. None is a mean over samples but where it says so.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "core")]

from problems import SGD, classes, mlp, seeded, train
from torch import nn
from torch.nn import functional as F
from torch.utils import data as torch_data

from nbdist.core.comm.world import World

MESHES = ["dp=1", "dp=2", "shard=2", "pp=2", "tp=2", "dp=3", "dp=2,pp=2", "dp=2,shard=2", "dp=4"]
BATCH, VALIDATED = 8, 29  # the last batch has five samples: some slices of four ranks are empty
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A metric and what it is measured on.

    Args:
        metric: Makes the metric as the user gives it.
        expected: What one process measures: called with the model, in evaluation mode, and the batches of the data.
        model: The model.
        training, data: What it is trained and measured on.
        step: The step; without one and without a loss, the model computes its loss from a dict.
        loss: The loss.
        split_at: Where a pipeline is cut.
    """

    metric: Callable[[], Any]
    expected: Callable[[nn.Module, list[Any]], dict[str, Any]]
    model: Callable[[], nn.Module] = mlp
    training: Callable[[], Any] = lambda: classes(12)
    data: Callable[[], Any] = lambda: classes(VALIDATED)
    step: Any = None
    loss: Any = "cross_entropy"
    split_at: str = "2"
    evaluate: Any = None
    """Evaluates in place of the step, and without a metric."""


# Callables over the whole set.


def macro_f1(output, target):
    """Of class numbers: the mean over classes of 2 TP / (2 TP + FP + FN)."""
    assert len(output) in (1, VALIDATED) or len(output) <= BATCH
    found, scores = output.argmax(-1), []
    for number in range(output.shape[-1]):
        hits = ((found == number) & (target == number)).sum()
        scores.append(2 * hits / ((found == number).sum() + (target == number).sum()).clamp(min=1))
    return torch.stack(scores).mean()


def auroc(output, target):
    """Of class 0 against the others; a NumPy value. One class alone has none, and is an error."""
    score, truth = output[:, 0].numpy(), (target == 0).numpy()
    if truth.all() or not truth.any():
        raise ValueError("only one class is present")
    pairs = score[truth][:, None] - score[~truth][None]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


def r2(output, target):
    """One less the share of the target's variance that is left; in place, on what it is given."""
    target -= 0.25
    output -= 0.25
    return 1 - float((output - target).square().sum() / (target - target.mean()).square().sum())


def confusion(output, target):
    """Counts of (target, found), a tensor."""
    return torch.bincount(target * 3 + output.argmax(-1), minlength=9).view(3, 3)


def bleu(output, references):
    """A corpus score with a geometric mean and a brevity penalty, of strings."""
    words = [[f"w{int(n)}" for n in row] for row in output.argsort(-1)]
    texts, log = [reference.split() for reference in references], 0.0
    for n in (1, 2):
        hits = total = 0
        for found, truth in zip(words, texts, strict=True):
            grams = [Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (found, truth)]
            hits += sum((grams[0] & grams[1]).values())
            total += sum(grams[0].values())
        log += math.log((hits + 1) / (total + 1)) / 2
    lengths = [sum(map(len, side)) for side in (words, texts)]
    return {"bleu": math.exp(min(0.0, 1 - lengths[1] / lengths[0]) + log), "length": lengths[0]}


def half_weighted(output, target):
    """A mean over weights, which any slices average to."""
    weight = 2 * target + 1
    return ((output.argmax(-1) == target) * weight).sum().double() / weight.sum(), weight.sum()


# Objects with `update` and `compute`.


class UserR2:
    """A user's own; without `reset`, and with state that a new evaluation must not find."""

    def __init__(self):
        self.outputs, self.targets = [], []

    def update(self, output, target):
        self.outputs.append(output)
        self.targets.append(target)

    def compute(self):
        return r2(torch.cat(self.outputs).clone(), torch.cat(self.targets).clone())


class F1State(nn.Module):
    """As a library's: a module with buffers, `reset`, and a sum over all processes in `compute` if there are any."""

    def __init__(self):
        super().__init__()
        for name in ("hits", "found", "truth"):
            self.register_buffer(name, torch.full((3,), 7.0))  # as if it had been used

    def reset(self):
        for name in ("hits", "found", "truth"):
            getattr(self, name).zero_()

    def update(self, output, target):
        found = output.argmax(-1)
        for number in range(3):
            self.hits[number] += ((found == number) & (target == number)).sum()
            self.found[number] += (found == number).sum()
            self.truth[number] += (target == number).sum()

    def compute(self):
        if torch.distributed.is_initialized():
            for name in ("hits", "found", "truth"):
                torch.distributed.all_reduce(getattr(self, name))
        return (2 * self.hits / (self.found + self.truth).clamp(min=1)).mean()


class Collection(F1State):
    """Several values by name, one of them of three numbers."""

    def compute(self):
        return {"F1": super().compute(), "recall": self.hits / self.truth.clamp(min=1), "loss": self.hits.sum()}


class MeanOfBatches:
    """Depends on how the data is cut into batches; takes output and target as a pair."""

    def __init__(self):
        self.means = []

    def reset(self):
        self.means.clear()

    def update(self, pair):
        output, target = pair
        self.means.append((output.argmax(-1) == target).double().mean())

    def compute(self):
        return sum(self.means) / len(self.means)


# Functions that evaluate by themselves, and what a step logs.

f1, of_batches = F1State(), MeanOfBatches()


def judge(model, batch):
    """An object by its update, one by a call of each batch, a mean, and one over something else than samples."""
    x, y = batch
    output = model(x)
    f1.update(output.argmax(-1).eq(torch.arange(3)[:, None]).T.double(), target=y)
    of_batches.update((output, y))
    share, over = half_weighted(output, y)
    mean = (output.argmax(-1) == y).double().mean()
    return {
        "loss": F.cross_entropy(output, y),
        "f1": f1,
        "batches": of_batches,
        "weighted": (share, over),
        "share": mean,
    }


def judged(model, batches):
    values = updated("f1", F1State)(model, batches) | updated("batches", MeanOfBatches)(model, batches)
    values |= whole("weighted", lambda output, target: half_weighted(output, target)[0])(model, batches)
    return values | whole("share", lambda output, target: (output.argmax(-1) == target).double().mean())(model, batches)


def judge_labels(model, batch):
    """A dict, whose mean is over labels that count."""
    output, counted = model(**batch), (batch["labels"][:, 1:] != IGNORED).sum()
    return {"loss": (output["loss"], counted), "share": (_shares(True)(output["logits"], batch["labels"]), counted)}


def logging_step(model, batch):
    x, y = batch
    output = model(x)
    return F.cross_entropy(output, y), {
        "share": (output.argmax(-1) == y).double().mean(),
        "size": output.square().mean(),
    }


def logged(model, batches):
    values = whole("share", lambda output, target: (output.argmax(-1) == target).double().mean())(model, batches)
    return values | whole("size", lambda output, _target: output.square().mean())(model, batches)


# Models and data of other forms.


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.b(self.a(x).tanh()).squeeze(-1)


def regression(samples=VALIDATED):
    x, y = classes(samples)
    return x, x[:, 0].sin() + y


class TextSet(torch_data.Dataset):
    def __init__(self, samples=VALIDATED, text=True):
        self.x, self.y = classes(samples)
        self.text = text

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        y = int(self.y[i])
        return self.x[i], " ".join(f"w{(y + k) % 3}" for k in range(2 + i % 2)) if self.text else y


class Stream(torch_data.IterableDataset):
    def __init__(self):
        self.rows = list(zip(*classes(VALIDATED), strict=True))

    def __iter__(self):
        return iter(self.rows)


def text_step(model, batch):
    return model(batch[0]).square().mean()


class Output(OrderedDict):
    """A model's output whose entries are attributes too."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


# As the libraries that have such outputs do.
torch.utils._pytree.register_pytree_node(
    Output, lambda output: (list(output.values()), list(output)), lambda values, keys: Output(zip(keys, values)),  # noqa: B905
    serialized_type_name="measured.Output",
)  # fmt: skip


class Sequences(nn.Module):
    """A causal language model that takes ids and labels, and compares each output with the next label."""

    causal = True

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, input_ids, labels):
        logits = self.head(self.mix(self.embedding(input_ids).cumsum(1)).tanh())
        pair = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
        return Output(loss=F.cross_entropy(pair[0].flatten(0, 1), pair[1].flatten()), logits=logits)


class Masked(Sequences):
    """The same, but each output is compared with its own label."""

    causal = False


def sequences(samples=VALIDATED):
    ids = torch.randint(11, (samples, 5), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[torch.arange(samples) % 3 == 0, 3:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def next_label_loss(output, labels):
    """The mean loss of all places of the set together; not a mean over samples."""
    return F.cross_entropy(output[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# What one process measures.


def whole(name, function, *, logits=False, target=-1):
    """`function` on outputs and targets of the whole set."""

    def expected(model, batches):
        outputs = [model(**batch).logits if logits else model(batch[0]) for batch in batches]
        targets = [batch["labels"] if logits else batch[-1] for batch in batches]
        joined = torch.cat(targets) if isinstance(targets[0], torch.Tensor) else [t for one in targets for t in one]
        value = function(torch.cat(outputs), joined)
        return value if isinstance(value, dict) else {name: value}

    return expected


def updated(name, make):
    """An object, updated by the batches of one process."""

    def expected(model, batches):
        metric = make()
        getattr(metric, "reset", lambda: None)()
        for batch in batches:
            pair = model(batch[0]), batch[-1]
            metric.update(pair) if isinstance(metric, MeanOfBatches) else metric.update(*pair)
        value = metric.compute()
        return (
            {("Collection_loss" if k == "loss" else k): v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )

    return expected


def _shares(causal):
    def function(output, labels):
        pair = (output[:, :-1], labels[:, 1:]) if causal else (output, labels)
        return (pair[0].argmax(-1) == pair[1])[pair[1] != IGNORED].double().mean()

    return function


def _perplexity(causal):
    def function(output, labels):
        pair = (output[:, :-1], labels[:, 1:]) if causal else (output, labels)
        return F.cross_entropy(pair[0].flatten(0, 1), pair[1].flatten()).exp()

    return function


_LANGUAGE = {
    "training": lambda: sequences(12), "data": sequences, "loss": None, "split_at": "mix",
}  # fmt: skip
_REGRESSION = {
    "model": lambda: seeded(Regressor, torch.float64), "training": lambda: regression(12), "data": regression,
    "loss": "mse", "split_at": "b",
}  # fmt: skip


def _language(kind):
    return lambda: seeded(kind, torch.float64)


CASES: dict[str, Measured] = {
    "F1": Measured(metric=lambda: macro_f1, expected=whole("macro_f1", macro_f1)),
    "AUROC": Measured(metric=lambda: auroc, expected=whole("auroc", auroc)),
    "R2, in place": Measured(metric=lambda: r2, expected=whole("r2", r2), **_REGRESSION),
    "R2, own class": Measured(metric=UserR2, expected=updated("UserR2", UserR2), **_REGRESSION),
    "confusion matrix": Measured(metric=lambda: confusion, expected=whole("confusion", confusion)),
    "corpus score of strings": Measured(
        metric=lambda: bleu, expected=whole("bleu", bleu), training=lambda: TextSet(12), data=TextSet, step=text_step,
        loss=None,
    ),
    "weighted mean": Measured(
        metric=lambda: half_weighted, expected=whole("half_weighted", lambda o, t: half_weighted(o, t)[0])
    ),
    "F1, module": Measured(metric=F1State, expected=updated("F1State", F1State)),
    "collection": Measured(metric=Collection, expected=updated("Collection", Collection)),
    "mean of batches": Measured(metric=MeanOfBatches, expected=updated("MeanOfBatches", MeanOfBatches)),
    "mean of batches, stream": Measured(
        metric=MeanOfBatches, expected=updated("MeanOfBatches", MeanOfBatches),
        data=lambda: torch_data.DataLoader(Stream(), batch_size=BATCH),
    ),
    "F1, stream": Measured(
        metric=lambda: macro_f1, expected=whole("macro_f1", macro_f1),
        data=lambda: torch_data.DataLoader(Stream(), batch_size=BATCH),
    ),
    "perplexity, causal": Measured(
        metric=lambda: "perplexity", expected=whole("perplexity", _perplexity(True), logits=True),
        model=_language(Sequences), **_LANGUAGE,
    ),
    "accuracy, causal": Measured(
        metric=lambda: "accuracy", expected=whole("accuracy", _shares(True), logits=True), model=_language(Sequences),
        **_LANGUAGE,
    ),
    "accuracy, masked": Measured(
        metric=lambda: "accuracy", expected=whole("accuracy", _shares(False), logits=True), model=_language(Masked),
        **_LANGUAGE,
    ),
    "loss of a dict's labels": Measured(
        metric=lambda: next_label_loss, expected=whole("next_label_loss", next_label_loss, logits=True),
        model=_language(Sequences), **_LANGUAGE,
    ),
    "evaluate, of all kinds": Measured(metric=lambda: None, evaluate=judge, expected=judged),
    "evaluate, a stream": Measured(
        metric=lambda: None, evaluate=judge, expected=judged,
        data=lambda: torch_data.DataLoader(Stream(), batch_size=BATCH),
    ),
    "evaluate, labels of a dict": Measured(
        metric=lambda: None, evaluate=judge_labels, expected=whole("share", _shares(True), logits=True),
        model=_language(Sequences), **_LANGUAGE,
    ),
    "the step's log": Measured(metric=lambda: None, step=logging_step, loss=None, expected=logged),
}  # fmt: skip


def run_case(world: World, name: str, mesh: str, epochs: int = 1, **options: Any) -> Any:
    """The last row of the history, on one rank, and the trained weights."""
    case = CASES[name]
    model = case.model()
    given = {"loss": case.loss} if case.loss else {"step": case.step}
    if "pp" in mesh:
        options |= {"split_at": [case.split_at], "microbatches": 2}
    result, weights = train(
        world, model, case.training(), val=case.data(), metric=case.metric(), evaluate=case.evaluate, optimizer=SGD,
        batch_size=BATCH,
        strategy=mesh, check="yes" if case.loss is None else "no", epochs=epochs, **given, **options,
    )  # fmt: skip
    return result.history[-1], weights


def in_one_process(name: str, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What plain PyTorch measures with these weights."""
    case = CASES[name]
    model = case.model().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return {f"val_{key}": as_tensor(value) for key, value in case.expected(model, batches(case.data())).items()}


def batches(data: Any) -> list[Any]:
    """The batches of one process."""
    if isinstance(data, dict):
        return [{k: t[i : i + BATCH] for k, t in data.items()} for i in range(0, VALIDATED, BATCH)]
    if isinstance(data, tuple):
        return [[t[i : i + BATCH] for t in data] for i in range(0, VALIDATED, BATCH)]
    if isinstance(data, torch_data.DataLoader):
        return list(data)
    return list(torch_data.DataLoader(data, batch_size=BATCH))


def as_tensor(value: Any) -> torch.Tensor:
    """A number, or nested lists of numbers, in float64."""
    return value.double() if isinstance(value, torch.Tensor) else torch.as_tensor(value, dtype=torch.float64)
