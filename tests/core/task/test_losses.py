"""Loss functions by name; their means average exactly over slices of any kind."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import CLASSES, FEATURES, SGD, alone, classes, mlp, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.task.losses import LOSSES, find_loss, loss_name
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

IGNORED = -100
LENGTH = 5


def tokens(ignore):
    """Sequences of very uneven length: a sample's ignored tokens are its padding; the first two hold nothing else."""
    x = torch.randn(12, LENGTH, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.randint(CLASSES, (12, LENGTH), generator=torch.Generator().manual_seed(4))
    for i in range(12):
        y[i, (i // 2) % (LENGTH + 1) :] = ignore
    return x, y


def flat_cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten()), (target != IGNORED).sum()


def token_step(model, batch):
    x, y = batch
    return flat_cross_entropy(model(x), y)


class Swap(nn.Module):
    """For losses that want ``(batch, classes, length)``."""

    def forward(self, x):
        return x.transpose(1, 2)


def class_weights():
    return torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


# The loss for nbdist, the mean for plain torch if that is another function, and the ignored target.
LOSS_CASES = {
    "cross_entropy by name": ("cross_entropy", F.cross_entropy, IGNORED),
    "F.cross_entropy": (F.cross_entropy, F.cross_entropy, IGNORED),
    "class weights": (nn.CrossEntropyLoss(class_weights()), None, IGNORED),
    "own ignored class": (nn.CrossEntropyLoss(class_weights(), ignore_index=1, label_smoothing=0.1), None, 1),
    "nll": (nn.NLLLoss(class_weights()), None, IGNORED),
    "a callable with its weight": (flat_cross_entropy, lambda o, t: flat_cross_entropy(o, t)[0], IGNORED),
    "a step with its weight": (token_step, lambda o, t: flat_cross_entropy(o, t)[0], IGNORED),
}


def task_of(case):
    loss, plain, ignore = LOSS_CASES[case]
    model = mlp()
    if not case.endswith("with its weight"):
        model.append(Swap())
    return model, loss, plain or loss, tokens(ignore)


def train_tokens(world, case):
    model, loss, _, data = task_of(case)
    how = {"step": loss} if "step" in case else {"loss": loss}
    result, trained = train(world, model, data, **how, optimizer=SGD, batch_size=12, shuffle=False, epochs=3)
    return [row["loss"] for row in result.history], trained


@pytest.mark.parametrize("case", LOSS_CASES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_means_over_tokens_average_exactly(run_ranks, ranks, case):
    """Ignored tokens, class weights and fully ignored slices: ranks train as torch does on the whole batch."""
    model, _, plain, (x, y) = task_of(case)
    optimizer, history = SGD(model.parameters()), []
    for _ in range(3):
        optimizer.zero_grad()
        value = plain(model(x), y)
        value.backward()
        optimizer.step()
        history.append(value.item())
    for losses, trained in run_ranks(ranks, train_tokens, case):
        torch.testing.assert_close(losses, history, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(trained, weights(model), rtol=1e-12, atol=1e-12)


def train_on_nothing(world):
    x, y = classes(12)
    result, trained = train(world, mlp(), (x, torch.full_like(y, IGNORED)), optimizer=SGD, batch_size=6)
    return result.history[0], trained


def test_a_batch_with_nothing_to_count_moves_nothing(run_ranks):
    """If every target of a batch is ignored, no rank steps: no momentum, no decay, no nan in the weights."""
    for row, trained in run_ranks(2, train_on_nothing):
        assert (2, 12) == (row["steps"], row["samples"])
        assert row["loss"] != row["loss"], "the mean over nothing is not a number"
        torch.testing.assert_close(trained, weights(mlp()), rtol=0, atol=0)


TARGETS = {
    "bce": torch.tensor([[0.0, 1.0, 1.0]]),
    "cross_entropy": torch.tensor([2]),
    "kl_div": torch.tensor([[0.5, 0.25, 0.25]]),
    "nll": torch.tensor([2]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_gradient(name):
    """Each well-known name is a differentiable mean of (output, target)."""
    output = torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    find_loss(name)(output, TARGETS.get(name, torch.zeros(1, 3))).backward()
    assert output.grad.isfinite().all()
    assert name == loss_name(name)


def test_probabilities_of_classes_count_samples():
    """With probabilities as targets the mean is over positions, and so is its weight."""
    output, target = torch.randn(4, 3, 5), torch.rand(4, 3, 5)
    loss = find_loss("cross_entropy")
    assert (F.cross_entropy(output, target), 20) == (loss(output, target), loss.weight(loss(output, target), target))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("cross_entrpy", r"unknown loss 'cross_entrpy': use bce, .*, or a callable\. Did you mean 'cross_entropy'\?"),
        (3, "loss must be a name or a callable, not 3"),
        (nn.MSELoss, r"loss MSELoss is a class, not a loss: write MSELoss\(\)"),
    ],
)
def test_what_is_no_loss_is_refused(loss, message):
    """The error names the value and the cure."""
    with pytest.raises(TaskError, match=message):
        find_loss(loss)


def summed(output, target):
    return F.cross_entropy(output, target, reduction="sum")


def summed_step(model, batch):
    return summed(model(batch[0]), batch[1])


SUMS = {
    "a name": {"loss": "cross_entropy", "reduction": "sum"},
    "a function of torch": {"loss": F.cross_entropy, "reduction": "sum"},
    "a callable": {"loss": summed, "reduction": "sum"},
    "a step": {"step": summed_step, "reduction": "sum"},
    "a module that says so": {"loss": nn.CrossEntropyLoss(reduction="sum")},
    "a partial that says so": {"loss": functools.partial(F.cross_entropy, reduction="sum")},
}
SUM_OPTIONS = {"optimizer": "sgd", "lr": 1e-2, "batch_size": 8, "epochs": 2, "shuffle": False}


def train_on_sums(world, given, strategy):
    data = classes(27)  # the last batch has three samples
    result, trained = train(world, mlp(), data, val=data, **SUM_OPTIONS, **given, strategy=strategy)
    return trained, [row["loss"] for row in result.history], result.plan.checked


@pytest.mark.parametrize("given", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("strategy", ["data", "shard", "pipeline"])
def test_losses_that_are_sums_train_by_the_sum_of_the_batch(run_ranks, given, strategy):
    """Also in a short batch; the loss that is shown is the mean of the batches' sums, each as often as its samples."""
    model, (x, y) = mlp(), classes(27)
    optimizer, sums = torch.optim.SGD(model.parameters(), 1e-2), []
    for epoch in range(2):
        sums.append(0.0)
        for start in range(0, 27, 8):
            rows = slice(start, start + 8)
            optimizer.zero_grad()
            loss = summed(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            sums[epoch] += loss.item() * len(y[rows]) / 27
    for trained, shown, checked in run_ranks(2, train_on_sums, given, strategy):
        torch.testing.assert_close(trained, weights(model), rtol=0, atol=1e-12)
        assert "as in one process" in checked
        if shown != [0.0, 0.0]:
            assert sums == pytest.approx(shown, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": nn.MSELoss(), "reduction": "sum"}, "has reduction='mean', but reduction='sum' is given: omit one"),
        ({"loss": nn.MSELoss(reduction="none")}, "has reduction='none': use reduction='mean', or 'sum'"),
    ],
)
def test_reductions_that_contradict_each_other_are_refused(given, message):
    """A loss says itself what it is, or the option does."""
    with pytest.raises(TaskError, match=message):
        Task.create(mlp(), classes(8), **given)


@pytest.mark.parametrize(
    ("step", "given", "message"),
    [
        (summed_step, {}, r"and their sum is the loss: .* Of a sum, give reduction='sum' \(--reduction sum\)"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]), {"reduction": "sum"}, "it is no mean over samples"),
        (lambda m, b: (summed_step(m, b), 3), {"reduction": "sum"}, "returns a sum, without a weight: omit one"),
    ],
)
def test_a_reduction_that_is_not_the_steps_is_found(step, given, message):
    """By the check, where slices differ in size; nothing is trained."""
    with pytest.raises(TaskError, match=message):
        alone(mlp(), classes(27), step=step, **SUM_OPTIONS, **given, accumulate=2)
