"""What a step logs beside its loss: exact means over slices and ranks, on every mesh."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, alone, assert_same_bits, classes, mlp, train
from torch.nn import functional as F

import nbdist
from nbdist.errors import TaskError
from nbdist.telemetry import ListSink, Noted, Progress

SAMPLES, BATCH = 22, 8  # the last batch of an epoch holds 6
OPTIONS = {"optimizer": SGD, "batch_size": BATCH, "shuffle": False, "epochs": 2}
IGNORED = -100


def logging_step(model, batch):
    """A mean over samples, and one over what the loss is a mean over."""
    x, y = batch
    output = model(x)
    weight = (y != IGNORED).sum()
    loss = F.cross_entropy(output, y, ignore_index=IGNORED)
    hits = (output.argmax(1) == y).sum() / weight
    return loss, weight, {"accuracy": hits, "size": (output.square().mean(1) * (y != IGNORED)).sum() / weight}


def partly_ignored(samples):
    x, y = classes(samples)
    y[::3] = IGNORED
    return x, y


def plain_means():
    """What a plain loop in one process logs, by batch, with the weights of the batches."""
    model, (x, y) = mlp(), partly_ignored(SAMPLES)
    optimizer, found = SGD(model.parameters()), []
    for _ in range(OPTIONS["epochs"]):
        for start in range(0, SAMPLES, BATCH):
            loss, weight, log = logging_step(model, (x[start : start + BATCH], y[start : start + BATCH]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append((float(weight), {name: value.item() for name, value in log.items()}))
    return found


def mean(found, name):
    return sum(weight * log[name] for weight, log in found) / sum(weight for weight, _ in found)


def run(world, step, data, options):
    sink = ListSink()
    result, weights = train(world, mlp(), data, step=step, sinks=[sink], **OPTIONS | options)
    curve = {
        name: [(point.step, point.mean) for event in sink.events if isinstance(event, Progress)
               for point in event.curves.get(name, ())]
        for name in ("loss", "accuracy", "size", "late")
    }  # fmt: skip
    return result.history, weights, curve, [event.text for event in sink.events if isinstance(event, Noted)]


@pytest.mark.parametrize(
    ("mesh", "ranks", "microbatches"),
    [("dp=1", 1, 1), ("dp=2", 2, 1), ("dp=3", 3, 1), ("shard=2", 2, 2), ("tp=2", 2, 1), ("pp=2", 2, 2),
     ("dp=2,shard=2", 4, 1), ("dp=2,pp=2", 4, 2)],
)  # fmt: skip
def test_history_and_curves_hold_exact_means(run_ranks, mesh, ranks, microbatches):
    """As a plain loop would log them: by step in the curves, and over an epoch in its row."""
    results = run_ranks(
        ranks,
        run,
        logging_step,
        partly_ignored(SAMPLES),
        {"strategy": mesh, ("microbatches" if "pp" in mesh else "accumulate"): microbatches},
    )
    expected = plain_means()
    steps = len(expected) // OPTIONS["epochs"]
    for history, *_ in results:
        for number, row in enumerate(history):
            for name in ("accuracy", "size"):
                found = expected[number * steps : (number + 1) * steps]
                assert mean(found, name) == pytest.approx(row[name], rel=1e-6)
    _, _, curve, notes = results[0]
    for name in ("accuracy", "size"):
        assert [step for step, _ in curve[name]] == [*range(1, len(expected) + 1)]
        assert [log[name] for _, log in expected] == pytest.approx([value for _, value in curve[name]], rel=1e-6)
    assert not notes


def reproducible(world):
    return run(world, logging_step, partly_ignored(SAMPLES), {"reproducible": True, "val": partly_ignored(9)})


def test_bits_do_not_depend_on_the_number_of_ranks(run_ranks):
    """Under `reproducible`, those of the log are the same too."""
    alone, *others = (run_ranks(ranks, reproducible)[0] for ranks in (1, 2, 3, 4))
    for history, weights, curve, _ in others:
        assert_same_bits(alone[1], weights)
        assert alone[2] == curve
        assert [without_seconds(row) for row in alone[0]] == [without_seconds(row) for row in history]


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "tp=2"])
def test_validation_logs_too(run_ranks, mesh):
    """The step runs on the validation data, and what it logs there is a mean over all of them."""
    options = {"strategy": mesh, "val": partly_ignored(13)}
    for history, weights, *_ in run_ranks(2, run, logging_step, classes(SAMPLES), options):
        model = mlp()
        model.load_state_dict(weights)
        with torch.no_grad():
            _, _, log = logging_step(model.eval(), partly_ignored(13))
        assert {name: float(value) for name, value in log.items()} == pytest.approx(
            {name: history[-1][f"val_{name}"] for name in log}, rel=1e-6
        )


class Late:
    """Logs under a new name in every third step, and on a part of the ranks alone."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        x, y = batch
        self.calls += 1
        loss = F.cross_entropy(model(x), y)
        if self.calls % 3 == 0 and torch.equal(x[0], classes(SAMPLES)[0][0]):
            return loss, {"late": float(self.calls)}
        return loss, {}


def test_names_may_come_late(run_ranks):
    """And on one rank alone: the mean is over the slices that logged it."""
    results = run_ranks(2, run, Late(), classes(BATCH), {"epochs": 7, "check": "no"})
    for history, *_ in results:
        assert [row.get("late") for row in history] == [None, None, 3.0, None, None, 6.0, None]
    assert [(3, 3.0), (6, 6.0)] == results[0][2]["late"]


def largest(model, batch):
    x, y = batch
    output = model(x)
    return F.cross_entropy(output, y), {"largest": output.max(), "mean": output.mean()}


def own_rank(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y), {"rank": float(nbdist.rank())}


def test_what_is_no_mean_over_slices_is_noted(run_ranks):
    """The check sees it before the first update, says what is shown, and the run goes on."""
    _, _, _, (note,) = run_ranks(2, run, largest, classes(SAMPLES), {})[0]
    assert note.startswith("log['largest'] is ")
    assert "as the mean over its slices, which is shown" in note


def test_what_depends_on_the_rank_is_noted(run_ranks):
    """It is another number than in one process."""
    history, _, _, (note,) = run_ranks(2, run, own_rank, classes(2 * BATCH), {})[0]
    assert note.startswith("log['rank'] is 0.")
    assert note.endswith("on mesh dp=2, and 0 in one process: the step makes it of more than its slice")
    assert [0.5, 0.5] == [row["rank"] for row in history]


def returns(log):
    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]), None, log(batch)

    return step


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (lambda batch: {"kl": batch[0]}, r"log\['kl'\] is a tensor of shape \(8, 6\): end it with .mean\(\)"),
        (
            lambda batch: {"kl": "much"},
            r"log\['kl'\] is a value of type str: give a number, or a tensor of one element",
        ),
        (lambda batch: {"kl": None}, r"log\['kl'\] is a value of type NoneType"),
        (lambda batch: {"loss": 1.0}, r"log has a value under 'loss', which a history has already: use another name"),
        (lambda batch: {"val_x": 1.0}, r"under 'val_x', which a history has already"),
        (lambda batch: {3: 1.0}, r"log has a value under 3: give names, as in"),
        (lambda batch: [1.0], r"the step's log is a value of type list: log is a dict"),
        (
            lambda batch: {str(i): 1.0 for i in range(65)},
            r"at most 64 numbers, each with a curve of its own, and here are more, such as .64.",
        ),
    ],
)
def test_mistakes_are_sentences(log, sentence):
    """What cannot be logged is refused in the first step."""
    with pytest.raises(TaskError, match=sentence):
        alone(mlp(), classes(BATCH), step=returns(log), **OPTIONS)
