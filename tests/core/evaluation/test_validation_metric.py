"""A metric of any form: what it is called with, how often, its errors; see tests/compatibility for its values."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from problems import SGD, alone, classes, mlp, train
from torch import nn

from nbdist.core.evaluation.metric_values import as_values
from nbdist.core.process import memory
from nbdist.core.task.metrics import find_metric, metric_name, target_of, updates_by_pair
from nbdist.errors import TaskError
from nbdist.telemetry import JsonlSink

TRAIN, VAL = classes(12), classes(29)
OPTIONS = {"val": VAL, "optimizer": SGD, "batch_size": 8, "check": "no"}


def counted(world, metric, epochs=1):
    """The last row, and what a metric that notes its calls has noted on this rank."""
    result, _ = train(world, mlp(), TRAIN, metric=metric, epochs=epochs, **OPTIONS)
    return result.history[-1], metric.calls


class Whole:
    """A callable for the whole set that prints, warns, draws a random number and changes its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, output, target):
        print("measured")
        warnings.warn("measured", stacklevel=1)
        self.calls.append((len(output), output.sum().item(), torch.rand(()).item() > 2))
        output.zero_()
        return float(len(target))


class Mean(Whole):
    def __call__(self, output, target):
        return super().__call__(output, target), len(target)


def test_a_callable_sees_the_whole_set_once(capsys, recwarn):
    """The call that finds out what it returns is on a copy, and is not seen."""
    metric = Whole()
    row, calls = counted_alone(metric)
    assert 29.0 == row["val_Whole"]
    assert [8, 29] == [samples for samples, *_ in calls]
    assert 1 == capsys.readouterr().out.count("measured")
    assert 1 == sum("measured" in str(one.message) for one in recwarn)


def counted_alone(metric, **options):
    result, _ = alone(mlp(), TRAIN, metric=metric, **OPTIONS, **options)
    return result.history[-1], getattr(metric, "calls", None)


def test_a_mean_with_its_weight_is_called_once_a_slice(capsys, recwarn):
    """And nothing that it prints is lost."""
    row, calls = counted_alone(Mean())
    assert (8 * 24 + 5 * 5) / 29 == pytest.approx(row["val_Mean"])
    assert [8, 8, 8, 5] == [samples for samples, *_ in calls]
    assert 4 == capsys.readouterr().out.count("measured")


def test_one_rank_is_called(run_ranks):
    """The other ranks call it not even once, and have its value."""
    results = run_ranks(3, counted, Whole())
    assert [{"val_Whole": 29.0}] * 3 == [{"val_Whole": row["val_Whole"]} for row, _ in results]
    assert [2, 0, 0] == [len(calls) for _, calls in results]


class Dislikes(Whole):
    """Fails on a part of the set."""

    def __call__(self, output, target):
        if len(target) < 29:
            raise ValueError("too few")
        return 3


def test_what_fails_on_a_part_is_called_on_the_whole():
    """As AUROC does where one class alone is present."""
    assert 3.0 == counted_alone(Dislikes())[0]["val_Dislikes"]


class State:
    """An object with state that an evaluation must neither find nor leave."""

    def __init__(self):
        self.values = ["of the notebook"]

    def update(self, output, target):
        self.values.append(len(output))

    def compute(self):
        return {"samples": np.float32(sum(self.values)), "batches": len(self.values)}

    def reset(self):
        self.values = []


def test_an_object_of_the_notebook_stays_as_it_is():
    """A copy is reset before each evaluation, and updated."""
    metric = State()
    row, _ = counted_alone(metric, epochs=2)
    assert (29.0, 4.0) == (row["val_samples"], row["val_batches"])
    assert ["of the notebook"] == metric.values
    assert "val_State" not in row


def fails(output, target):
    return output.nonsense


class FailsInUpdate(State):
    def update(self, output, target):
        raise KeyError("lost")


class FailsInCompute(State):
    def compute(self):
        raise KeyError("lost")


def changes(output, target):
    return (0.5, 8) if len(target) == 8 else 0.5


def whole_only(output, target):
    if len(target) < 29:
        raise ValueError("a score needs all samples")
    return 0.5, 0.25


def pair_of_vectors(output, target):
    return torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (fails, "metric fails raised AttributeError: 'Tensor' object has no attribute 'nonsense'"),
        (FailsInUpdate(), "metric FailsInUpdate raised KeyError: 'lost'"),
        (FailsInCompute(), "metric FailsInCompute raised KeyError: 'lost'"),
        (changes, r"metric changes returned \(mean, weight\) for one slice and float for another: return the same"),
        (pair_of_vectors, r"metric pair_of_vectors returned two values that are not \(mean, weight\)"),
        (
            lambda output, target: (0.8, 0.75),
            r"returned \(0.8, 0.75\), and in \(mean, weight\) the weight is",
        ),
        (lambda output, target: (torch.tensor(1.0), torch.tensor(1.0)), r"returned \(1, 1\), .* return a dict for two"),
        (whole_only, r"metric whole_only returned \(0.5, 0.25\), .* return a dict for two values"),
        (lambda output, target: None, "metric metric returned nothing: return a number"),
        (lambda output, target: "good", "metric metric returned a value of type str: return a number"),
        (lambda output, target: torch.zeros(17, 16), "metric metric returned 272 numbers, and a history keeps 256"),
        (lambda output, target: {}, "metric metric returned an empty dict"),
    ],
)
def test_an_error_names_the_metric(metric, message):
    """In one sentence, with the line of the metric in its traceback."""
    with pytest.raises(TaskError, match=message) as caught:
        counted_alone(metric)
    if metric is fails:
        assert "fails" in [frame.name for frame in caught.traceback]


def train_failing(world):
    train(world, mlp(), TRAIN, metric=fails, **OPTIONS)


def test_the_error_of_a_metric_is_that_of_one_rank(run_ranks):
    """The others have lost a peer, which is a secondary failure."""
    with pytest.raises(TaskError, match="metric fails raised AttributeError"):
        run_ranks(3, train_failing)


def test_outputs_that_do_not_fit_into_memory_are_refused(monkeypatch, tmp_path):
    """After the first batch, with what to return instead."""
    (tmp_path / "meminfo").write_text("MemTotal: 3 kB\nMemAvailable: 0 kB\n")
    monkeypatch.setattr(memory, "_FREE", tmp_path / "meminfo")
    cure = r"metric Whole needs together, take .* GiB of memory, and 0\.0 GiB are free: return \(mean, weight\) from it"
    with pytest.raises(TaskError, match=cure):
        counted_alone(Whole())
    assert 4 == len(counted_alone(Mean())[1])


class Logits(nn.Module):
    """Returns a dict, whose tensors a metric may want."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, labels=None):
        logits = self.inner(x)
        found = {"hidden": logits * 2, "logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def takes_hidden(output, target):
    return float(output["hidden"].shape[0] == len(target))


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets", "y"])
def test_the_target_of_a_dict(key):
    """By any of its usual names; of an object by its attribute."""
    batch = {"x": 1, key: 2}
    assert 2 == target_of(batch, "f1")
    assert 2 == target_of(type("Batch", (), {"x": 1, key: 2})(), "f1")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": 1, "z": 2}, "metric f1 takes .* one of the keys labels, .*, y, but a batch here is a dict with the"),
        ({"label": 1, "y": 2}, "metric f1 has one target, but a batch has several, label, y: leave one"),
        (torch.zeros(3), "but a batch here is a single value"),
        ([torch.zeros(3)], "but a batch here is a single value"),
    ],
)  # fmt: skip
def test_a_batch_without_one_target_is_refused(batch, message):
    """Before the first step."""
    with pytest.raises(TaskError, match=message):
        target_of(batch, "f1")


def test_a_model_that_returns_a_dict():
    """A metric by name takes its logits, a callable the dict; without logits there is a sentence."""
    step = {"step": lambda model, batch: nn.functional.cross_entropy(model(batch[0])["logits"], batch[1])}
    accuracy = alone(Logits(), TRAIN, metric="accuracy", **step, **OPTIONS)[0].history[-1]["val_accuracy"]
    expected = alone(mlp(), TRAIN, metric="accuracy", **OPTIONS)[0].history[-1]["val_accuracy"]
    assert expected == accuracy
    assert 1.0 == alone(Logits(), TRAIN, metric=takes_hidden, **step, **OPTIONS)[0].history[-1]["val_takes_hidden"]

    class Hidden(Logits):
        def forward(self, x):
            return {"hidden": super().forward(x)["hidden"]}

    own = {"step": lambda model, batch: nn.functional.cross_entropy(model(batch[0])["hidden"], batch[1])}
    with pytest.raises(TaskError, match="metric accuracy needs a tensor, but the model returned a dict with the keys"):
        alone(Hidden(), TRAIN, metric="accuracy", **own, **OPTIONS)


class OnlyCompute:
    def compute(self, predictions, references):
        return {"f1": 0.0}


@pytest.mark.parametrize(
    ("metric", "message"),
    [(State, r"metric State is a class, not a metric: write State\(\)\."),
     (OnlyCompute(), r"metric OnlyCompute has compute, but no update: give a callable metric\(output, target\)")],
)  # fmt: skip
def test_what_is_nearly_a_metric_is_refused(metric, message):
    """With what to write instead."""
    with pytest.raises(TaskError, match=message):
        find_metric(metric)


def test_names_of_metrics():
    """A lambda has none."""
    assert ["accuracy", "fails", "State", "metric"] == [
        metric_name(one) for one in ("accuracy", fails, State(), lambda output, target: 0)
    ]


class ByPair:
    def update(self, output):
        pass


def test_an_update_of_one_argument_takes_the_pair():
    """As some libraries have it."""
    assert updates_by_pair(ByPair())
    assert not updates_by_pair(State())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([[2]]), 2.0), (np.float32(0.5), 0.5), (True, 1.0), (torch.eye(2), [[1.0, 0.0], [0.0, 1.0]]),
        ([1, torch.tensor(2)], [1.0, 2.0]), (np.array([1, 2]), [1, 2]),
    ],
)  # fmt: skip
def test_values_are_plain_numbers(value, expected):
    """Of any library."""
    assert {"val_f1": expected} == as_values(value, "f1")
    assert {"val_a": expected, "val_f1_loss": expected} == as_values({"a": value, "loss": value}, "f1")


def test_dicts_in_a_dict_have_names_of_both():
    """As a report of every class: none hides another."""
    report = {"cat": {"recall": 1, "loss": 2}, "dog": {"recall": 0.5}, "accuracy": 0.75}
    expected = {"val_cat_recall": 1.0, "val_cat_cat_loss": 2.0, "val_dog_recall": 0.5, "val_accuracy": 0.75}
    assert expected == as_values(report, "report")


class AnyAttribute(State):
    """Makes up every attribute that it does not have, as lazy metrics of some libraries do."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: self.nothing_of_the_kind[name]


def test_only_what_a_class_defines_follows_the_data():
    """An attribute made up on the fly is not called."""
    assert 29.0 == counted_alone(AnyAttribute())[0]["val_samples"]


def confusion(output, target):
    return torch.bincount(target * 3 + output.argmax(-1), minlength=9).view(3, 3)


def test_a_matrix_is_in_the_history_and_the_record(tmp_path):
    """As nested lists; the validation loss stays what the schedule sees."""
    sink = JsonlSink(tmp_path / "record.jsonl")
    plateau = lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # noqa: E731
    result, _ = alone(mlp(), TRAIN, metric=confusion, lr_scheduler=plateau, sinks=[sink], **OPTIONS)
    sink.close()
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    recorded = next(row for row in rows if row["event"] == "EpochFinished")["row"]["val_confusion"]
    assert recorded == result.history[-1]["val_confusion"]
    assert 29 == sum(map(sum, recorded))
