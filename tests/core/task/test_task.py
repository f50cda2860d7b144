"""The task: the user's arguments are checked first, with errors that name the value and the cure."""

from __future__ import annotations

import pytest
import torch
from problems import FEATURES, SGD, alone, classes, mlp, weights
from torch import nn
from torch.utils import data as torch_data

from nbdist.core.data.reader import Slice
from nbdist.core.task.task import Task
from nbdist.errors import NbdistError, PlanError, TaskError

DATA = classes(8)
LOADER = torch_data.DataLoader(torch_data.TensorDataset(*DATA), batch_size=4, shuffle=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)


def frozen():
    return mlp().requires_grad_(False)


def step(model, batch):
    return model(batch[0]).square().mean()


class Holder(nn.Linear):
    """It has a buffer without values."""

    def __init__(self):
        super().__init__(3, 1)
        self.table = nn.Buffer(torch.empty(3, device="meta"))


def sparse_buffer():
    net = nn.Linear(3, 1)
    net.register_buffer("adjacency", torch.eye(3).to_sparse())
    return net


MODELS = {
    "a class": (Net, r"net is a class, not a model: write Net\(\)\."),
    "no module": ([1], r"net is a value of type list, not a torch\.nn\.Module\."),
    "nothing to train": (nn.Sequential(nn.ReLU()), "net has no parameters to train"),
    "frozen": (frozen(), "net has no parameters to train: all are frozen"),
    "wrapped": (nn.DataParallel(mlp()), r"net is wrapped in DataParallel: pass the module inside, net\.module"),
    "lazy": (nn.LazyLinear(3), "weight of net has no shape yet: run one batch through net first"),
    "without values": (nn.Linear(3, 1, device="meta"), "weight of net is on the meta device, without values: allocate"),
    "a buffer without values": (Holder(), "table of net is on the meta device, without values: allocate"),
    "a sparse buffer": (sparse_buffer(), r"adjacency of net is a sparse tensor.*register it dense"),
    "scripted": (
        nn.Sequential(torch.jit.trace(nn.Linear(3, 1), torch.ones(1, 3))),
        "0 is a module of TorchScript",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_is_no_model_to_train_is_refused(case):
    """Errors use the user's name for it."""
    model, message = MODELS[case]
    with pytest.raises(TaskError, match=message):
        Task.create(model, DATA, loss="mse", names=("net", "train_set"))


SUPPLIED = {
    "no data": ({"data": None}, TaskError, "train_set is None, not data: give a Dataset"),
    "no loss": ({"loss": None}, TaskError, r"no loss: name one .*, or write the step"),
    "loss and step": ({"step": step}, TaskError, "give loss=... or step=..., not both"),
    "a step that cannot be called": ({"loss": None, "step": 3}, TaskError, r"step must be a callable step\(mo.*not 3"),
    "a loss that cannot be called": ({"loss": 3}, TaskError, "loss must be a name or a callable, not 3"),
    "metric without val": ({"metric": "accuracy"}, TaskError, r"metric accuracy has no data to be measured on: give v"),
    "no pairs": ({"data": DATA[0]}, TaskError, r"loss compares .* but a batch here is a single value: give \(x, y\) d"),
    "a dict": ({"data": {"x": DATA[0]}}, TaskError, "but a batch here is a dict: .* write the step yourself"),
    "val without pairs": (
        {"val": DATA[0], "metric": "accuracy"}, TaskError, "metric accuracy takes the last .* batch here is a single v",
    ),
    "no val": ({"val": 3}, TaskError, "val is a value of type int, not data"),
    "two batch sizes": (
        {"data": LOADER, "batch_size": 8}, PlanError, "batch_size=8 contradicts the DataLoader train_set, which has 4",
    ),
    "two orders": (
        {"data": LOADER, "shuffle": False}, PlanError, "shuffle=False contradicts the DataLoader train_set, which has",
    ),
    "unknown optimizer": ({"optimizer": "adamv"}, TaskError, r"unknown optimizer 'adamv': .* Did you mean 'adam.?'\?"),
    "no optimizer": ({"optimizer": 3}, TaskError, "optimizer must be a name, a callable or an optimizer, not 3"),
    "two rates": (
        {"optimizer": SGD(mlp().parameters()), "lr": 0.1}, TaskError, r"lr=0\.1 is given, but the optimizer is ready-m",
    ),
    "a callable without a rate": (
        {"optimizer": lambda parameters: SGD(parameters), "lr": 0.1}, TaskError, r"lr=0\.1 .* takes no lr: set the rat",
    ),
    "an optimizer of another model": (
        {"optimizer": SGD(mlp().parameters())}, TaskError, "optimizer SGD holds 4 parameters that are not the model's:",
    ),
    "no optimizer made": (
        {"optimizer": lambda parameters: None}, TaskError, "returned NoneType, not a torch optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SUPPLIED)
def test_what_cannot_be_used_is_refused(case):
    """One sentence with the value and the cure; a notebook shows it without a traceback."""
    changed, error, message = SUPPLIED[case]
    supplied = {"data": DATA, "loss": "cross_entropy", **changed}
    with pytest.raises(error, match=message) as caught:
        Task.create(mlp(), **supplied, names=("net", "train_set"))
    assert isinstance(caught.value, NbdistError)
    assert [f"{error.__name__}: {caught.value}"] == caught.value._render_traceback_()


@pytest.mark.parametrize("option", [{"early_stop": "val_loss:3"}, {"keep_best": "val_loss"}])
def test_what_looks_at_validation_needs_data_for_it(option):
    """Else the run would fail after its first epoch."""
    ((name, value),) = option.items()
    given = {"loss": "mse", **option}
    with pytest.raises(PlanError, match=f"{name}={value} is measured on validation data, and there is none: give val="):
        Task.of_options(mlp(), DATA, given)
    Task.of_options(mlp(), DATA, {**given, "val": DATA})


def test_creating_a_task_changes_nothing():
    """Neither the model nor the caller's random states change."""
    model, state = mlp(), torch.get_rng_state()
    before = weights(model)
    Task.create(model, DATA, loss="cross_entropy", val=DATA, metric="accuracy")
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_what_was_supplied_names_itself():
    """Names, learning rate, batch size and shuffle come from the arguments."""
    task = Task.create(
        mlp(), LOADER, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD, lr=0.5, val=DATA, metric=len
    )
    assert {
        "loss": "CrossEntropyLoss", "reduction": "mean", "optimizer": "SGD", "lr": 0.5, "lr_scheduler": "",
        "metric": "len", "evaluate": "", "after_step": "", "each_epoch": "", "batch_size": 4,
        "shuffle": True, "flat_samples": True, "updates": False, "carries": False,
    } == task.options  # fmt: skip
    assert "step" == Task.create(mlp(), DATA, step=step).options["loss"]


@pytest.mark.parametrize(
    ("width", "title"),
    [(1, "Linear (2 parameters)"), (100, "Linear (10.1 k parameters)"), (1200, "Linear (1.44 M parameters)")],
)
def test_a_title_says_what_is_trained(width, title):
    """The model's class and number of parameters."""
    assert title == Task.create(nn.Linear(width, width), DATA, loss="mse").title


@pytest.mark.parametrize(
    ("given", "weight"),
    [(torch.tensor(2.0), 8), ((torch.tensor([2.0]), 5), 5), ((torch.tensor(2.0), torch.tensor(5)), 5)],
)
def test_a_step_gives_a_mean_and_maybe_its_weight(given, weight):
    """Without a weight the mean is over samples."""
    loss, over = Task.create(mlp(), DATA, step=lambda model, batch: given).loss_and_weight(
        DATA, Slice(index=0, samples=8, batch=DATA)
    )
    assert (2.0, ()) == (loss.item(), loss.shape)
    assert weight == over


@pytest.mark.parametrize(
    ("given", "message"),
    [(3.0, "it is a float"), (torch.ones(2), r"it is a tensor of shape \(2,\)"), (None, "it is None")],
)
def test_a_step_that_gives_no_scalar_is_named(given, message):
    """The error names what the step returned."""
    with pytest.raises(
        TaskError, match=f"the loss must be a scalar tensor, the mean over a batch, but {message}|{message}"
    ):
        alone(mlp(), DATA, step=lambda model, batch: given, optimizer=SGD)


@pytest.mark.parametrize(
    "batch", [{"prior": torch.ones(4), "x": DATA[0]}, (torch.ones(5, 8, 2), DATA[1]), [], torch.tensor(1.0), "text"]
)
def test_a_mean_is_over_the_samples_of_its_slice(batch):
    """For any inputs, whichever of their dims is that of the samples."""
    task = Task.create(mlp(), DATA, step=lambda model, batch: torch.tensor(2.0))
    assert 8 == task.loss_and_weight(batch, Slice(index=0, samples=8, batch=batch))[1]
