"""Targets that a loss of torch's cannot compare with the output, or compares with the wrong ones: one sentence."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, alone, classes, mlp, train
from torch import nn

from nbdist.errors import PeerLostError, TaskError

X, Y = classes(16, torch.float32)


class Both(nn.Module):
    """Returns more than the output."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = mlp(torch.float32), kind

    def forward(self, x):
        output = self.net(x)
        return (output, x) if self.kind is tuple else {"logits": output}


CLASSES = {
    "too many": (
        Y + 1,
        r"hold classes from \d to 3, but the model has 3 outputs, for the classes 0 to 2: give",
    ),
    "from -1 on": (Y - 1, r"classes from -1 to \d, but the model has 3 outputs.*: number the classes from 0 on"),
    "floats": (Y.float(), r"takes class numbers as whole numbers \(int64\), not targets of .* float32: give y\.long"),
    "int32": (Y.int(), r"takes class numbers as whole numbers \(int64\), not targets of .* int32: give y\.long"),
    "a column": (
        Y[:, None],
        r"takes one class number a sample, not targets of shape \(\d+, 1\).*: give y\.squ",
    ),
    "one-hot": (
        nn.functional.one_hot(Y, 3),
        r"class numbers or probabilities, not .*: give y\.argmax\(1\), or",
    ),
}


@pytest.mark.parametrize(("target", "message"), CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss()])
def test_targets_that_are_no_class_numbers(loss, target, message):
    """With what the batch holds, and what to write."""
    with pytest.raises(TaskError, match=message):
        alone(mlp(torch.float32), (X, target), loss=loss, optimizer=SGD, batch_size=8)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_a_model_that_returns_more_than_the_output(kind):
    """The step has to pick a part."""
    with pytest.raises(TaskError, match=f"loss cross_entropy takes a tensor, but the model returns a {kind.__name__}"):
        alone(Both(kind), (X, Y), loss="cross_entropy", optimizer=SGD)


def test_targets_that_are_no_numbers():
    """As strings."""
    rows = [(x, "cat") for x in X]
    with pytest.raises(TaskError, match="takes a tensor as target, but the last element of a batch is a tuple of str"):
        alone(mlp(torch.float32), rows, loss="cross_entropy", optimizer=SGD)


def compared(world, mesh):
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    with pytest.raises((TaskError, PeerLostError)) as caught:
        train(
            world, net, (X, X[:, 0]), loss="mse", optimizer=SGD, batch_size=8, strategy=mesh,
            **({"split_at": ("2",)} if mesh == "pp=2" else {}),
        )  # fmt: skip
    return "" if isinstance(caught.value, PeerLostError) else str(caught.value)


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "tp=2", "pp=2"])
def test_targets_that_torch_would_repeat(run_ranks, mesh):
    """Each output would be compared with the targets of all samples, with no more than a warning."""
    messages = [message for message in run_ranks(2, compared, mesh) if message]  # a pipeline's first stage sees none
    assert messages
    for message in messages:
        assert "would repeat them to" in message
        assert "give the targets as y.unsqueeze(-1), or let the model end with .squeeze(-1)" in message


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "smooth_l1", nn.MSELoss(), nn.L1Loss()])
def test_every_loss_that_compares_elements(loss):
    """By name and as a module; a target with one more dimension than the output too."""
    with pytest.raises(TaskError, match=r"compares an output of shape \(\d+, 3\) with a target of shape \(\d+, 3, 1\)"):
        alone(mlp(torch.float32), (X, X[:, :3, None]), loss=loss, optimizer=SGD, batch_size=16)


def test_a_loss_of_ones_own_may_repeat():
    """It knows why."""

    def loss(output, target):
        return (output - target).square().mean()

    alone(mlp(torch.float32), (X, X[:, :1]), loss=loss, optimizer=SGD, batch_size=16)


def test_an_error_of_another_kind_stays_as_it_is():
    """Such as one of the model's own shapes."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        alone(mlp(torch.float32), (X[:, :5], Y), loss="cross_entropy", optimizer=SGD)
