"""The weight of a loss, read from its graph: with it slices average exactly."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from problems import SGD, alone, seeded, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.task.loss_graph import LossGraph
from nbdist.core.task.loss_weight import counted_targets, mean_over
from nbdist.errors import TaskError

SAMPLES, LENGTH, CLASSES = 4, 6, 3
COUNTS = torch.tensor([6, 1, 0, 2])
LABELS = torch.where(torch.arange(LENGTH) < COUNTS[:, None], torch.arange(SAMPLES * LENGTH).view(4, 6) % CLASSES, -100)
VALID = 9
OUTPUT = torch.randn(SAMPLES, LENGTH, CLASSES, generator=torch.Generator().manual_seed(1)).requires_grad_()
WEIGHTS = torch.tensor([0.5, 1.0, 4.0])
MASK = (LABELS != -100).float()
PARAMETER = nn.Parameter(torch.tensor([0.5, 2.0]))
KNOWN = torch.tensor(0.5)


def tokens(output, **options):
    return F.cross_entropy(output.flatten(0, 1), LABELS.flatten(), **options)


def each(output):
    return F.cross_entropy(output.transpose(1, 2), LABELS, reduction="none")


@pytest.mark.parametrize(
    ("mean", "count"),
    [
        (tokens, VALID),
        (lambda output: F.cross_entropy(output.transpose(1, 2), LABELS), VALID),
        (lambda output: tokens(output.double()), VALID),
        (lambda output: tokens(output, weight=WEIGHTS), None),
        (lambda output: tokens(output, label_smoothing=0.1), None),
        (lambda output: tokens(output.bfloat16()), None),
        (lambda output: 2 * tokens(output), None),
        (lambda output: tokens(output.detach()), None),
    ],
    ids=["rows", "positions", "float64", "class weights", "smoothing", "half precision", "scaled", "no graph"],
)
def test_a_mean_over_classes_has_counted_its_targets(mean, count):
    """Where it is nothing but that mean, and its count is not rounded."""
    assert count == counted_targets(mean(OUTPUT))


def shifted(output):
    return F.cross_entropy(output[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())


# A loss, and the number that it is a mean over; None if its graph does not show it.
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
    "a mean, and nothing of a sum": (lambda o: tokens(o) + 0.0 * o.sum() + 0 * o.square().sum(), VALID),
    "a sum": (lambda o: o.square().sum(), None),
    "a sum of losses": (lambda o: tokens(o, reduction="sum") * 0.1, None),
    "a sum by a fixed number": (lambda o: tokens(o, reduction="sum") / 64, None),
    "what is no mean": (lambda o: o.square().mean().sqrt(), None),
    "a mean by a number": (lambda o: tokens(o) * 0.5 + 1.0, VALID),
    "a mean by a known tensor": (lambda o: tokens(o) / KNOWN, VALID),
    "a mean by a parameter": (lambda o: tokens(o) * (-PARAMETER[:1].exp()).sum() + PARAMETER.sum(), None),
    "a mean by parameters, and a penalty": (lambda o: tokens(o) / PARAMETER.norm() + 0.1 * PARAMETER.norm(), VALID),
    "tokens, by class and smoothed": (
        lambda o: tokens(o, weight=WEIGHTS, label_smoothing=0.1),
        WEIGHTS[LABELS[LABELS >= 0]].sum().item(),
    ),
    "samples with a margin": (lambda o: F.multi_margin_loss(o[:, 0], LABELS[:, 0].clamp(0)), SAMPLES),
    "a mean that is masked": (lambda o: (each(o) * MASK).mean(), SAMPLES * LENGTH),
    "a masked mean by the mask's": (lambda o: (each(o) * MASK).mean() / MASK.mean(), None),
    "a masked mean by the mask's, inside": (lambda o: (each(o) * MASK / MASK.mean()).mean(), None),
    "a masked mean by counts": (lambda o: (each(o) * MASK).mean() * MASK.numel() / MASK.sum(), None),
    "a mean by its count": (lambda o: each(o)[LABELS != -100].mean() * MASK.sum(), None),
    "a mean by the number of samples, as a float": (lambda o: o.square().mean() * float(len(o)), None),
    "a mean for each sample, added up": (lambda o: sum(one.square().mean() for one in o), None),
    "a sum over elements by their number": (lambda o: (o - 1).abs().sum() / o.numel(), SAMPLES * LENGTH * CLASSES),
    "a mean by the number of samples": (lambda o: o.square().mean() * len(o), None),
    "a mean by the number of elements": (lambda o: o.square().mean() / o.numel(), None),
    "the inverse of a mean": (lambda o: torch.ones(()) / o.square().mean(), None),
    "a masked sum by its count": (lambda o: (each(o) * MASK).sum() / MASK.sum(), None),
    "means side by side": (lambda o: torch.stack([tokens(o), o.square().mean()]).mean(), None),
}


def over(loss):
    mean = mean_over(loss, SAMPLES, lambda: [KNOWN])
    return None if mean is None or mean.counts else pytest.approx(float(mean.over))


@pytest.mark.parametrize("name", LOSSES)
def test_the_number_that_a_mean_is_over(name):
    """With gradients enabled, as in training."""
    loss, expected = LOSSES[name]
    assert expected == over(loss(OUTPUT))


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.endswith((", inside", "by counts", "by side"))])
def test_the_number_that_a_mean_is_over_in_evaluation(name):
    """Under `no_grad` with a `LossGraph`: the same number, if there is one."""
    loss, expected = LOSSES[name]
    with torch.no_grad(), LossGraph() as outline:
        value = loss(OUTPUT)
    assert not value.requires_grad
    assert expected == over(outline.of(value))


FORMS = {
    "a mean": (lambda o: tokens(o), ()),
    "a scaled mean": (lambda o: tokens(o) / 2.0, (0.5,)),
    "two over the same": (lambda o: tokens(o) + 3.0 * tokens(o.flip(-1)), (1.0, 3.0)),
    "two over others": (lambda o: o[:, 0, 0].square().mean() + 2.0 * o.abs().mean(), (1.0, 2.0, 1.0, 18.0)),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_slices_have_to_share(name):
    """Factors, and elements per sample for means over different numbers; empty for a plain mean."""
    loss, expected = FORMS[name]
    assert expected == mean_over(loss(OUTPUT), SAMPLES).form


def test_what_is_recorded_keeps_no_activations():
    """No tensors are saved for backward."""
    with torch.no_grad(), LossGraph() as outline:
        value = torch.ones(32, 64).abs().square().mean().sqrt()
    node = outline.of(value).grad_fn
    assert ("SqrtBackward0", "MeanBackward0") == (node.name(), node.next_functions[0][0].name())
    with torch.no_grad(), LossGraph() as outline:
        value = F.mse_loss(torch.ones(32, 64), torch.zeros(32, 64))
    assert "meta" == outline.of(value).grad_fn._saved_self.device.type


class Model(nn.Module):
    """Computes its own loss over labels, like models of transformers."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)
        with torch.no_grad():
            self.line.weight.copy_(torch.eye(CLASSES))
            self.line.bias.zero_()

    def forward(self, x, labels):
        output = self.line(x)
        return {"loss": F.cross_entropy(output.flatten(0, 1), labels.flatten()), "output": output}


class Shares(Model):
    """Records the gradients that its losses get."""

    def forward(self, x, labels):
        loss = super().forward(x, labels)["loss"]
        if loss.requires_grad:
            loss.register_hook(lambda share: self.seen.append(share.item()))
        return {"loss": loss}


def shares(world, strategy, accumulate, options):
    model = Shares()
    model.seen = []
    train(
        world, model, {"x": DATA["x"].repeat(2, 1, 1), "labels": LABELS.clamp(0).repeat(2, 1)}, loss=None,
        optimizer=SGD, batch_size=2 * SAMPLES, strategy=strategy, accumulate=accumulate, **options,
    )  # fmt: skip
    return model.seen


CUTS = [
    ("dp=1", 1, {}),
    ("dp=1", 2, {}),
    ("dp=2", 1, {}),
    ("dp=2", 2, {}),
    ("shard=2", 1, {}),
    ("dp=2", 1, {"reproducible": 4}),
]


@pytest.mark.parametrize(("strategy", "accumulate", "options"), CUTS)
def test_backward_carries_a_slices_share_of_the_whole(run_ranks, strategy, accumulate, options):
    """Not its tokens per sample: operations that are not linear in the gradient would differ."""
    seen = list(itertools.chain(*run_ranks(int(strategy[-1]), shares, strategy, accumulate, options)))
    slices = options.get("reproducible") or int(strategy[-1]) * accumulate
    assert slices == len(seen)
    assert 1 == pytest.approx(sum(seen), rel=0 if slices == 1 else 0.42)


class Clamping(Model):
    """Clips the gradients of its activations."""

    def forward(self, x, labels):
        inner = self.line(x)
        if inner.requires_grad:
            inner.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return {"loss": F.cross_entropy(inner.flatten(0, 1), labels.flatten())}


def test_a_batch_that_is_not_cut_trains_as_by_hand():
    """Even if the model changes the gradients of its activations."""
    model, by_hand = Clamping(), Clamping()
    optimizer = SGD(by_hand.parameters())
    by_hand(**DATA)["loss"].backward()
    optimizer.step()
    _, found = alone(model, DATA, loss=None, optimizer=SGD, batch_size=SAMPLES, shuffle=False)
    torch.testing.assert_close(found, weights(by_hand), rtol=0, atol=0)


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
    """The error names the cure: slices of a sum cannot be averaged exactly, and the error would be silent."""
    with pytest.raises(TaskError, match=r"loss that Summing computes is not recognised .* assign loss and weight"):
        alone(Summing(), DATA, loss=None, optimizer=SGD, batch_size=SAMPLES, accumulate=2)


def test_of_a_batch_that_is_not_cut_nothing_has_to_be_known():
    """With one slice a sum is allowed, in training and in validation."""
    model, by_hand = Summing(), Summing()
    optimizer = SGD(by_hand.parameters())
    expected = by_hand(**DATA)["loss"]
    expected.backward()
    optimizer.step()
    result, found = alone(model, DATA, loss=None, optimizer=SGD, batch_size=SAMPLES, shuffle=False, val=DATA)
    torch.testing.assert_close(found, weights(by_hand), rtol=1e-12, atol=1e-12)
    assert expected.item() == pytest.approx(result.history[0]["loss"])
    assert by_hand(**DATA)["loss"].item() == pytest.approx(result.history[0]["val_loss"])


class MixedModel(Model):
    """A mean over masked elements, plus one over samples."""

    def forward(self, x, labels):
        output = super().forward(x, labels)["output"]
        return {"loss": output[labels >= 0].square().mean() + output[:, 0, 0].square().mean()}


def mixed(world, accumulate):
    data = {"x": DATA["x"], "labels": torch.where(torch.arange(LENGTH) < torch.tensor([[4], [4], [2], [2]]), 1, -100)}
    model = MixedModel()
    before = weights(model)
    with pytest.raises(TaskError, match="adds means over numbers whose ratio differs"):
        train(world, model, data, loss=None, optimizer=SGD, batch_size=4, shuffle=False, accumulate=accumulate)
    return before, weights(model)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 2), (2, 1)])
def test_means_whose_counts_come_out_even_are_refused(run_ranks, ranks, accumulate):
    """Slices with eight and with four masked elements: on all ranks, before the first update."""
    for before, after in run_ranks(ranks, mixed, accumulate):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


class Annealed(Model):
    """Two means, the second of which counts more from step to step."""

    def forward(self, x, labels):
        self.steps = getattr(self, "steps", 0) + self.training
        output = super().forward(x, labels)["output"]
        return {"loss": output.square().mean() + 0.25 * ((self.steps + 1) // 2) * output[:, 0].abs().mean()}


def test_a_factor_may_change_from_step_to_step():
    """All slices of a step have the same one."""
    alone(Annealed(), DATA, loss=None, optimizer=SGD, batch_size=SAMPLES, accumulate=2, epochs=3, val=DATA)


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
    """Elements that the user's function ignores have no weight."""
    for loss, x, y in run_ranks(2, by_a_callable):
        expected = half_ignored(torch.tensor(x, dtype=torch.float64), torch.tensor(y)).item()
        assert expected == pytest.approx(loss, rel=1e-9)


class Stranger(nn.modules.loss._Loss):
    """Named like torch's class, but with its own code, as in packages of losses."""

    def forward(self, output, target):
        return F.cross_entropy(output, target)


class Focal(nn.CrossEntropyLoss):
    def forward(self, output, target):
        each = F.cross_entropy(output, target, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


class Weighted(nn.CrossEntropyLoss):
    """torch's own code with other settings."""

    def __init__(self):
        super().__init__(torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), ignore_index=-100)


def penalized(output, target):
    return F.cross_entropy(output, target, ignore_index=-100) + 0.5 * (output - 1.0).abs().sum(1)[target >= 0].mean()


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, -100, -100, -100, 1])
EXACT = {
    "a stranger's class": Stranger(),
    "torch's class with another forward": Focal(),
    "torch's class with other settings": Weighted(),
    "a function": lambda o, y: half_ignored(o, y.clamp(0)),
    "a partial": functools.partial(F.cross_entropy, ignore_index=-100, label_smoothing=0.1),
    "a function with a tensor of its own": lambda o, y: KNOWN * half_ignored(o, y.clamp(0)),
    "squares": lambda o, y: F.mse_loss(o, F.one_hot(y.clamp(0), 3).double()) + 0.1 * o.abs().mean(),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_callable_averages_exactly(name):
    """One slice has three ignored targets, in training and in validation."""
    loss, model = EXACT[name], nn.Linear(3, 3, dtype=torch.float64)
    by_hand = copy.deepcopy(model)
    optimizer = SGD(by_hand.parameters())
    expected = loss(by_hand(X), Y)
    expected.backward()
    optimizer.step()
    result, found = alone(
        model, (X, Y), loss=loss, optimizer=SGD, batch_size=8, shuffle=False, accumulate=2, val=(X, Y)
    )
    torch.testing.assert_close(found, weights(by_hand), rtol=1e-12, atol=1e-12)
    assert expected.item() == pytest.approx(result.history[0]["loss"], rel=1e-12)
    assert loss(by_hand(X), Y).item() == pytest.approx(result.history[0]["val_loss"], rel=1e-12)


def masked(output, target):
    counts = target != -100
    return (F.cross_entropy(output, target, reduction="none", ignore_index=-100) * counts).sum() / counts.sum()


def rooted(output, target):
    return F.cross_entropy(output, target).sqrt()


def two(output, target):
    return F.cross_entropy(output, target) + output.square().mean()


WHOLE = {
    "twice": lambda o, y: F.cross_entropy(o, y) + 2.0 * F.multi_margin_loss(o, y),
    "sixths": lambda o, y: sum((i + 1) * F.cross_entropy(o * i, y) for i in range(3)) / 6,
    "three equal ones": lambda o, y: sum(F.cross_entropy(o * i, y) for i in range(1, 4)),
}


@pytest.mark.parametrize("samples", [6, 7])
@pytest.mark.parametrize("name", WHOLE)
def test_a_factor_that_equals_the_number_of_samples_is_no_count_if_another_slice_has_it_too(name, samples):
    """A slice of the step, or the whole batch in the check."""
    loss, model, x, y = WHOLE[name], nn.Linear(3, 3, dtype=torch.float64), X[:samples], Y[:samples].clamp(0)
    by_hand = copy.deepcopy(model)
    optimizer = SGD(by_hand.parameters())
    loss(by_hand(x), y).backward()
    optimizer.step()
    result, found = alone(model, (x, y), loss=loss, optimizer=SGD, batch_size=samples, shuffle=False, accumulate=3)
    torch.testing.assert_close(found, weights(by_hand), rtol=1e-12, atol=1e-12)
    assert result.plan.checked.startswith("loss, ")


def by_count(output, target):
    return F.cross_entropy(output, target) * len(target)


@pytest.mark.parametrize(("samples", "accumulate"), [(8, 2), (7, 2), (7, 3), (6, 3), (4, 2)])
@pytest.mark.parametrize("check", ["yes", "no"])
def test_a_mean_by_the_number_of_samples_is_refused_however_it_is_cut(samples, accumulate, check):
    """Its factor differs with the slice, or equals its size in all of them."""
    model, data = nn.Linear(3, 3, dtype=torch.float64), (X[:samples], Y[:samples].clamp(0))
    with pytest.raises(TaskError, match=r"^loss by_count is not recognised"):
        alone(model, data, loss=by_count, optimizer=SGD, batch_size=samples, accumulate=accumulate, check=check)


@pytest.mark.parametrize("loss", [masked, rooted, two])
def test_a_callable_of_which_cannot_be_seen_what_it_is_over_is_refused(loss):
    """One sentence names the line to write, before a weight has changed."""
    model = nn.Linear(3, 3, dtype=torch.float64)
    before = weights(model)
    with pytest.raises(
        TaskError,
        match=rf"^loss {loss.__name__} is not recognised .*return loss, \(target != -100\)\.sum\(\)",
    ):
        alone(model, (X, Y), loss=loss, optimizer=SGD, batch_size=8, accumulate=2)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


class Potential(nn.Module):
    """Its output is the gradient of what it computes, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, x, labels=None):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)
        return force if labels is None else {"loss": F.mse_loss(force, labels)}


class Watching(nn.Module):
    """Updates a buffer also in evaluation."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3).double()
        self.register_buffer("seen", torch.zeros(3).double())
        self.register_buffer("level", torch.zeros(()).double())

    def forward(self, x, labels=None):
        output = self.line(x)
        if not self.training:
            self.seen.mul_(0.9).add_(output.mean(0), alpha=0.1)
            self.level = 0.9 * self.level + 0.1 * output.abs().mean()
        output = output + 0.01 * self.seen + 0.01 * self.level
        return output if labels is None else {"loss": F.mse_loss(output, labels)}


def squares(output, target):
    return (output - target).square().mean()


@pytest.mark.parametrize("kind", [Potential, Watching])
@pytest.mark.parametrize("loss", [squares, None])
def test_evaluation_runs_a_model_as_it_would_without_gradients(kind, loss):
    """The model may call backward or change its buffers in evaluation; training continues unchanged."""
    y = X.flip(0)
    data = (X, y) if loss else {"x": X, "labels": y}
    options = {"optimizer": SGD, "batch_size": 8, "epochs": 2, "accumulate": 2}
    expected, _ = alone(seeded(kind), (X, y), loss="mse", val=(X, y), **options)
    result, _ = alone(seeded(kind), data, loss=loss, val=data, **options)
    for row, found in zip(expected.history, result.history, strict=True):
        assert (row["loss"], row["val_loss"]) == pytest.approx((found["loss"], found["val_loss"]), rel=1e-12)
