"""What a loss is a mean over, as its graph tells: the number with which slices average exactly."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, alone, train
from torch import nn
from torch.nn import functional as F

from nbdist.core.loss_weight import mean_over, recorded
from nbdist.errors import TaskError

SAMPLES, LENGTH, CLASSES = 4, 6, 3
COUNTS = torch.tensor([6, 1, 0, 2])
LABELS = torch.where(torch.arange(LENGTH) < COUNTS[:, None], torch.arange(SAMPLES * LENGTH).view(4, 6) % CLASSES, -100)
VALID = 9
OUTPUT = torch.randn(SAMPLES, LENGTH, CLASSES, generator=torch.Generator().manual_seed(1)).requires_grad_()
WEIGHTS = torch.tensor([0.5, 1.0, 4.0])


def tokens(output, **options):
    return F.cross_entropy(output.flatten(0, 1), LABELS.flatten(), **options)


def shifted(output):
    return F.cross_entropy(output[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())


# A loss, and the number that it is a mean over; None where that cannot be seen.
LOSSES = {
    "tokens": (tokens, VALID),
    "tokens, smoothed": (lambda o: tokens(o, label_smoothing=0.1), VALID),
    "tokens in half precision, which cannot count them": (
        lambda o: F.cross_entropy(o.bfloat16().repeat(1, 1, 50, 1).view(-1, 3), torch.ones(1200, dtype=torch.long)),
        1200,
    ),
    "tokens after the first": (shifted, 6),
    "tokens of (samples, classes, length)": (lambda o: F.cross_entropy(o.transpose(1, 2), LABELS), VALID),
    "tokens, by class": (lambda o: tokens(o, weight=WEIGHTS), WEIGHTS[LABELS[LABELS >= 0]].sum().item()),
    "tokens, summed and divided by their number": (lambda o: tokens(o, reduction="sum") / torch.tensor(VALID), VALID),
    "the same mean twice": (lambda o: (tokens(o) + 3 * tokens(o.flip(-1))) / 2, VALID),
    "samples": (lambda o: F.cross_entropy(o[:, 0], LABELS[:, 0].clamp(0)), SAMPLES),
    "squares": (lambda o: F.mse_loss(o[:, 0, 0], torch.zeros(SAMPLES)), SAMPLES),
    "what a mask chooses": (lambda o: o[LABELS != -100].square().mean(), VALID * CLASSES),
    "a sum over samples by their number": (lambda o: o.square().mean((1, 2)).sum() / len(o), SAMPLES),
    "means over samples and over all their elements": (lambda o: o[:, 0, 0].square().mean() + o.abs().mean(), SAMPLES),
    "means over tokens and over samples": (lambda o: tokens(o) + 0.1 * o.square().mean(), None),
    "a sum": (lambda o: o.square().sum(), None),
    "a sum of losses": (lambda o: tokens(o, reduction="sum") * 0.1, None),
    "a sum by a fixed number": (lambda o: tokens(o, reduction="sum") / 64, None),
    "what is no mean": (lambda o: o.square().mean().sqrt(), None),
    "means side by side": (lambda o: torch.stack([tokens(o), o.square().mean()]).mean(), None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_number_that_a_mean_is_over(name):
    """In training, and in evaluation, where no memory is kept for a backward."""
    loss, expected = LOSSES[name]
    with torch.no_grad(), recorded():
        measured = mean_over(loss(OUTPUT), SAMPLES)
    for over in (mean_over(loss(OUTPUT), SAMPLES), measured):
        assert expected == (over if over is None else pytest.approx(float(over)))


def test_a_graph_that_is_only_read_keeps_no_activations():
    """What backward would need is let go of."""
    layer = nn.Linear(64, 64)
    with torch.no_grad(), recorded():
        result = layer(torch.ones(32, 64))
    assert result.grad_fn is not None
    assert "meta" == result.grad_fn._saved_mat1.device.type


class Model(nn.Module):
    """Computes its own loss over labels, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            self.line.weight.copy_(torch.eye(CLASSES))
            self.line.bias.zero_()

    def forward(self, x, labels):
        output = self.line(x)
        return {"loss": F.cross_entropy(output.flatten(0, 1), labels.flatten()), "output": output}


class Summing(Model):
    def forward(self, x, labels):
        return {"loss": super().forward(x, labels)["output"].square().sum()}


DATA = {"x": OUTPUT.detach().double(), "labels": LABELS}


def own_loss(world, model, strategy):
    result, _ = train(
        world, model, DATA, loss=None, optimizer=SGD, batch_size=SAMPLES, shuffle=False, epochs=2, val=DATA,
        strategy=strategy,
    )  # fmt: skip
    return result.history[-1]["loss"], result.history[-1]["val_loss"], model.line.weight.tolist()


@pytest.mark.parametrize("strategy", ["dp=4", "dp=2,shard=2"])
def test_a_models_own_mean_over_tokens_averages_exactly(run_ranks, strategy):
    """Ranks with six labels, one, none and two train and evaluate as torch does on the whole batch."""
    model = Model()
    optimizer = SGD(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**DATA)["loss"]
        loss.backward()
        optimizer.step()
    expected = loss.item(), model(**DATA)["loss"].item(), model.line.weight.tolist()
    for found in run_ranks(4, own_loss, Model(), strategy):
        assert all(
            torch.allclose(torch.tensor(e), torch.tensor(f), atol=1e-9) for e, f in zip(expected, found, strict=True)
        )


def test_a_models_own_sum_is_refused():
    """With the cure: slices of a sum cannot be averaged, and a wrong number would show nowhere."""
    with pytest.raises(TaskError, match=r"the loss that Summing computes is no mean .* assign loss and weight"):
        alone(Summing(), DATA, loss=None, optimizer=SGD, batch_size=SAMPLES)


def half_ignored(output, target):
    return F.cross_entropy(output, target, ignore_index=0)


def by_a_callable(world):
    model = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    data = DATA["x"][:, 0], torch.tensor([1, 2, 0, 1])
    result, _ = train(world, model, data, loss=half_ignored, optimizer=SGD, batch_size=4, shuffle=False, val=data)
    return result.history[0]["loss"], data[0].tolist(), data[1].tolist()


def test_a_callables_mean_averages_exactly(run_ranks):
    """What a function of the person's leaves out weighs nothing."""
    for loss, x, y in run_ranks(2, by_a_callable):
        expected = half_ignored(torch.tensor(x, dtype=torch.float64), torch.tensor(y)).item()
        assert expected == pytest.approx(loss, rel=1e-9)
