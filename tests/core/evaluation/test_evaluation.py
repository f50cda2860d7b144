"""Validation: sharded over the ranks, every sample counted exactly once."""

from __future__ import annotations

import math

import pytest
import torch
from problems import FEATURES, SGD, alone, classes, mlp, seeded, train
from torch import nn
from torch.nn import functional as F
from torch.utils import data as torch_data

from nbdist.core.task.metrics import METRICS, find_metric
from nbdist.errors import PlanError, TaskError

TRAIN = classes(12)
IGNORED = -100


class Validation(torch_data.Dataset):
    def __init__(self, samples):
        self.x, self.y = classes(samples)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class ValidationStream(torch_data.IterableDataset):
    def __init__(self, samples):
        self.samples = list(zip(*classes(samples), strict=True))

    def __iter__(self):
        return iter(self.samples)


def partly_ignored(samples):
    x, y = classes(samples)
    y[::3] = IGNORED
    return x, y


FORMS = {
    "tensors": classes,
    "a data set": Validation,
    "a loader that would drop the last": lambda n: torch_data.DataLoader(Validation(n), batch_size=4, drop_last=True),
    "a stream": lambda n: torch_data.DataLoader(ValidationStream(n), batch_size=5),
    "partly ignored": partly_ignored,
}


def validate(world, form, samples):
    model = mlp(dropout=0.5)
    options = {"loss": "cross_entropy", "metric": "accuracy", "optimizer": SGD, "batch_size": 8, "check": "no"}
    result, _ = train(world, model, TRAIN, val=FORMS[form](samples), **options)
    return result.history[-1], model.state_dict()


def validate_each(world, form, sizes):
    return [validate(world, form, samples) for samples in sizes]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_sample_counts_once(run_ranks, ranks, form):
    """Loss and accuracy are those of the whole set at once, though neither batch nor ranks divide it."""
    sizes = (1, 13, 29)
    for samples, results in zip(sizes, zip(*run_ranks(ranks, validate_each, form, sizes), strict=True), strict=True):
        x, y = (partly_ignored if form == "partly ignored" else classes)(samples)
        for row, weights in results:
            model = mlp().eval()
            model.load_state_dict(weights)
            with torch.no_grad():
                output = model(x)
            assert math.isclose(F.cross_entropy(output, y), row["val_loss"], rel_tol=1e-12) or not (y >= 0).any()
            counted = y != IGNORED
            hits = (output.argmax(1) == y)[counted].sum().item()
            if counted.any():
                assert hits / counted.sum().item() == pytest.approx(row["val_accuracy"], rel=1e-12)
            else:
                assert math.isnan(row["val_accuracy"])


def test_validation_data_that_can_be_read_only_once_is_named():
    """A second epoch without validation data is an error, not a loss of nan."""
    data = ValidationStream(5)
    data.samples = iter(data.samples)
    with pytest.raises(PlanError, match=r"the validation data gave no batch: can it be read only once\?"):
        alone(mlp(), TRAIN, val=data, optimizer=SGD, epochs=2)


def half_right(output, target):
    """A user's metric, with the number of samples it is a mean over."""
    return (output.argmax(1) == target).double().mean(), len(target)


def largest(output, target):
    return output.max() * 0 + 3


class Constant:
    def __call__(self, output, target):
        return 2.0


@pytest.mark.parametrize(
    ("metric", "name"),
    [("accuracy", "val_accuracy"), (half_right, "val_half_right"), (largest, "val_largest"),
     (Constant(), "val_Constant")],
)  # fmt: skip
def test_a_metric_goes_by_its_name(metric, name):
    """The history holds the loss and the metric under ``val_``."""
    row = alone(mlp(), TRAIN, val=classes(7), metric=metric, optimizer=SGD)[0].history[0]
    assert [name, "val_loss"] == sorted(key for key in row if key.startswith("val_"))
    assert {"val_largest": 3.0, "val_Constant": 2.0}.get(name, row[name]) == row[name]


def test_without_a_metric_the_loss_is_measured():
    """``val`` alone gives ``val_loss``."""
    row = alone(mlp(), TRAIN, val=classes(7), optimizer=SGD)[0].history[0]
    assert {"val_loss"} == {key for key in row if key.startswith("val_")}


class Modes(nn.Module):
    """Records the modes in which it was called."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Dropout(0.5), nn.Linear(FEATURES, 3, dtype=torch.float64)
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, self.inner.training, torch.is_grad_enabled()))
        return self.last(self.inner(x))


def test_validation_runs_in_evaluation_mode_and_restores_modes():
    """Without gradients; afterwards each module has its own mode again."""
    model = Modes()
    model.inner.eval()
    alone(model, TRAIN, val=classes(3), optimizer=SGD, batch_size=12, epochs=2)
    training, validation = (True, False, True), (False, False, False)
    assert [training, validation] * 2 == model.seen
    assert (True, False) == (model.training, model.inner.training)


def step_without_model(model, batch):
    return model.last(batch[0]).square().mean()


def test_a_metric_needs_what_the_model_returned():
    """A step that never calls the model has no output to measure."""
    with pytest.raises(TaskError, match=r"a metric needs the model's output, but the step never called model"):
        alone(Modes(), TRAIN, step=step_without_model, val=classes(3), metric="accuracy", optimizer=SGD)


@pytest.mark.parametrize(
    ("output", "target", "expected"),
    [
        (torch.eye(3), torch.tensor([0, 1, 1]), 2 / 3),
        (torch.eye(3), torch.tensor([0, IGNORED, 1]), 1 / 2),
        (torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]]), torch.tensor([[0, 1]]), 1.0),  # (batch, classes, length)
        (torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), torch.tensor([[0, 2]]), 1 / 2),  # classes last
        (torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 0.0]), 1 / 2),  # one logit a target
        (torch.tensor([[-1.0], [2.0]]), torch.tensor([0, 1]), 1.0),
    ],
)
def test_accuracy(output, target, expected):
    """The share of counted targets that the output hits, in each layout of the classes."""
    value, weight = find_metric("accuracy")(output, target)
    assert expected == pytest.approx(value.item())
    assert (target != IGNORED).sum() == weight


def test_errors_by_name():
    """Mean absolute and mean squared error, with the number of values that they are over."""
    output, target = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert (1.5, 2) == METRICS["mae"](output, target)
    assert (2.5, 2) == METRICS["mse"](output, target)


@pytest.mark.parametrize("metric", ["accuracy", "mae", "mse"])
def test_output_and_target_are_compared_one_by_one(metric):
    """A column is not broadcast against a row, and other shapes are refused by name."""
    column, row = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 2.0, 3.0])
    value, weight = METRICS[metric](column, row)
    assert (float(metric == "accuracy"), 3) == (value, weight)
    with pytest.raises(
        TaskError, match=rf"metric {metric} compares an output of shape \(3, 1\) with a target of shape"
    ):
        METRICS[metric](column, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("metric", "message"),
    [("acuracy", r"unknown metric 'acuracy': use accuracy, .*, or a callable\. Did you mean 'accuracy'\?"),
     (3, "metric must be a name or a callable, or have update and compute, not 3")],
)  # fmt: skip
def test_what_is_no_metric_is_refused(metric, message):
    """The error names the value and the remedy."""
    with pytest.raises(TaskError, match=message):
        find_metric(metric)


class Forces(nn.Module):
    """The energy of each sample, and its gradient by the sample: `create_graph` in training only, as users write it."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = self.energy(x)
        return torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0] + energy


def forces(model, batch):
    return (model(batch[0]) - batch[0].sin()).square().mean()


def validate_forces(world, strategy):
    model = seeded(Forces, torch.float64)
    options = {"step": forces, "optimizer": SGD, "batch_size": 8, "strategy": strategy}
    result, _ = train(world, model, TRAIN, val=classes(12), **options)
    return result.history[-1], forces(model.eval(), classes(12)).item()


def test_a_step_that_takes_gradients_is_evaluated_with_them(run_ranks):
    """Forces from energies: the validation loss is that of the trained model."""
    for row, expected in run_ranks(2, validate_forces, "data"):
        assert expected == pytest.approx(row["val_loss"], rel=1e-12)


def test_gradients_in_evaluation_are_refused_on_a_mesh_that_gathers(run_ranks):
    """With the lines to write."""
    with pytest.raises(TaskError, match=r"takes a gradient .*`with torch\.enable_grad\(\):`, or use the strategy data"):
        run_ranks(2, validate_forces, "shard")


class OwnLoss(nn.Module):
    """Computes its loss over labels, most of which the last samples ignore."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.last = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, tokens, labels):
        logits = self.last(self.hidden(self.embedding(tokens)).tanh())
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tokens(samples):
    drawn = torch.randint(0, 9, (samples, 5), generator=torch.Generator().manual_seed(4))
    labels = drawn.roll(1, 1)
    labels[samples // 2 :, 1:] = IGNORED
    return {"tokens": drawn, "labels": labels}


def validate_own_loss(world, strategy):
    model = seeded(OwnLoss, torch.float64)
    options = {"loss": None, "optimizer": SGD, "batch_size": 8, "strategy": strategy}
    result, _ = train(world, model, tokens(16), val=tokens(21), **options)
    with torch.no_grad():
        return result.history[-1]["val_loss"], model.eval()(**tokens(21))["loss"].item()


@pytest.mark.parametrize("strategy", ["dp=2", "pp=2", "shard=2", "tp=2", "dp=2,pp=2", "pp=2,tp=2", "shard=2,pp=2"])
def test_a_loss_of_the_models_own_is_weighted_by_its_labels(run_ranks, strategy):
    """Also in a pipeline, whose last stage computes it."""
    for measured, expected in run_ranks(4 if "," in strategy else 2, validate_own_loss, strategy):
        assert expected == pytest.approx(measured, rel=1e-12)
