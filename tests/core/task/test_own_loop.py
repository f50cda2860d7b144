"""Steps that run a part of the training loop themselves, or cannot be called: one sentence with the cure."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import SGD, alone, classes, losses, mlp, train
from torch import nn
from torch.nn import functional as F

from nbdist.core.comm.world import World
from nbdist.errors import TaskError

DATA = classes(16, torch.float32)
NET = mlp(torch.float32)
OPTIMIZER = SGD(NET.parameters())
SCHEDULER = torch.optim.lr_scheduler.StepLR(OPTIMIZER, 1)


def calls_step(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    OPTIMIZER.step()
    return loss


def calls_step_inside(model, batch):
    def inner():
        OPTIMIZER.step()

    inner()
    return F.cross_entropy(model(batch[0]), batch[1])


def calls_scheduler(model, batch):
    SCHEDULER.step()
    return F.cross_entropy(model(batch[0]), batch[1])


def clears(model, batch):
    model.zero_grad()
    return F.cross_entropy(model(batch[0]), batch[1])


def takes_three(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (calls_step, r"the step calls OPTIMIZER\.step\(\): leave it out: nbdist runs backward.*optimizer=\.\.\."),
        (functools.partial(calls_step_inside), r"the step calls OPTIMIZER\.step\(\): leave it out"),
        (calls_scheduler, r"the step calls SCHEDULER\.step\(\).*give the lr_scheduler as lr_scheduler=\.\.\."),
        (clears, r"the step calls zero_grad\(\), which clears what earlier slices of the batch gave: leave it out"),
        (takes_three, r"step takes other arguments than \(model, batch\), .*: take the batch apart in the step"),
    ],
)
def test_a_step_leaves_the_loop_to_nbdist(step, message):
    """It is refused before anything runs."""
    with pytest.raises(TaskError, match=message):
        alone(NET, DATA, step=step, optimizer=OPTIMIZER, batch_size=8)


def test_an_optimizer_of_something_else_may_step():
    """As one that looks for an input."""
    other = torch.nn.Parameter(torch.zeros(()))
    inner = torch.optim.SGD([other], lr=0.1)

    def step(model, batch):
        inner.step()
        return F.cross_entropy(model(batch[0]), batch[1])

    alone(mlp(torch.float32), DATA, step=step, optimizer=SGD, batch_size=8)


def calls_backward(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def reads_before(model, batch):
    if batch[0].sum() > -1e9:
        scale = scale * 2  # noqa: F821, F841 - that is the mistake
    return F.cross_entropy(model(batch[0]), batch[1])


def train_on(world, step, mesh):
    with pytest.raises(TaskError) as caught:
        train(
            world, mlp(torch.float32), DATA, step=step, optimizer=SGD, batch_size=8, strategy=mesh,
            **({"split_at": ("2",)} if mesh == "pp=2" else {}),
        )  # fmt: skip
    return str(caught.value)


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "tp=2", "pp=2"])
def test_a_backward_of_the_returned_loss_is_named(run_ranks, mesh):
    """On every mesh."""
    messages = run_ranks(2, train_on, calls_backward, mesh)
    assert all(
        message.startswith("the step calls backward() on the loss that it returns: leave") for message in messages
    )


def test_a_name_that_is_read_before_it_is_assigned():
    """In Python's words it is no value at all."""
    message = train_on(World(), reads_before, "data")
    assert message.startswith(
        "the step assigns scale, so scale is a local name of it, and it is read before: call what"
    )


X64 = torch.randn(16, 6, 8, dtype=torch.float64)
Y32 = torch.randn(16, 1)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(48, 1)),
        nn.Sequential(nn.Conv1d(6, 1, 3), nn.Flatten(), nn.Linear(6, 1)),
        nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 1)),
        nn.Sequential(nn.TransformerEncoderLayer(8, 1), nn.Flatten(), nn.Linear(48, 1)),
    ],
)
def test_data_in_another_precision_than_the_model(model):
    """As NumPy's is by default."""
    with pytest.raises(TaskError, match=r"tensors of two dtypes meet in the step .*: give the data in the model's, as"):
        train(World(), model, (X64, Y32), loss="mse", batch_size=8)


def test_data_of_lists():
    """torch collates a list of numbers to a tensor for each place in it."""
    rows = [([1.0, 2.0, 3.0], [1.0]) for _ in range(16)]
    with pytest.raises(TaskError, match=r"a list is where the step needs a tensor .*: let the data give tensors"):
        train(World(), nn.Linear(3, 1).float(), rows, step=lambda m, b: m(b[0]).mean(), batch_size=8)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: None, "but it is None: end the step with `return loss`"),
        (lambda loss: loss.item(), r"but it is a float: return the tensor itself, without \.item\(\) or float"),
        (lambda loss: {"loss": loss}, "but it is a dict: return the loss in it"),
        (lambda loss: loss.expand(3), r"but it is a tensor of shape \(3,\): end it with \.mean\(\)"),
    ],
)
def test_what_a_step_returns(returned, message):
    """A scalar tensor; each other value has its own cure."""
    with pytest.raises(TaskError, match=message):
        alone(mlp(torch.float32), DATA, step=lambda m, b: returned(m(b[0]).square().mean()), optimizer=SGD)


class Margin(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return F.cross_entropy(output * self.scale, target)


class WithMargin(nn.Module):
    """Model and loss as one module."""

    def __init__(self):
        super().__init__()
        self.net, self.loss = mlp(torch.float32), Margin()

    def forward(self, x, y):
        return self.loss(self.net(x), y)


def test_a_loss_with_parameters_of_its_own():
    """It is refused where they would not be trained; frozen, it may stay; the cure trains them as a plain loop does."""
    with pytest.raises(TaskError, match=r"loss Margin has parameters of its own \(scale\), which would not be trained"):
        alone(mlp(torch.float32), DATA, loss=Margin(), optimizer=SGD)
    alone(mlp(torch.float32), DATA, loss=Margin().requires_grad_(False), optimizer=SGD, batch_size=16)
    plain, model = WithMargin(), WithMargin()
    optimizer = SGD(plain.parameters())
    for start in (0, 8):
        optimizer.zero_grad()
        plain(DATA[0][start : start + 8], DATA[1][start : start + 8]).backward()
        optimizer.step()
    result, _ = alone(
        model, DATA, step=lambda m, batch: m(*batch), optimizer=SGD, batch_size=8, shuffle=False, accumulate=2
    )
    assert 1 == len(losses(result))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
