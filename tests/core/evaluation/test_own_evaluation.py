"""evaluate(model, batch) in place of the step: numbers and objects over the whole set, on every mesh."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, alone, classes, mlp, train
from torch.nn import functional as F
from torch.utils import data as torch_data

from nbdist.errors import TaskError

TRAIN, VAL = classes(16), 13
OPTIONS = {"loss": "cross_entropy", "optimizer": SGD, "batch_size": 8}


class F1:
    """The F1 score of class 1; it asks for nothing but update, compute and reset."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.hits = self.claims = self.targets = 0
        self.sizes = []

    def update(self, predicted, target):
        self.sizes.append(len(target))
        self.hits += int(((predicted == 1) & (target == 1)).sum())
        self.claims += int((predicted == 1).sum())
        self.targets += int((target == 1).sum())

    def compute(self):
        return {"f1": 2 * self.hits / max(1, self.claims + self.targets), "batches": self.sizes}


class Module(torch.nn.Module):
    """As a metric of torchmetrics: its forward updates twice, to return the value of the batch too."""

    def __init__(self):
        super().__init__()
        self.total, self.count = 0.0, 0

    def reset(self):
        self.total, self.count = 0.0, 0

    def update(self, value, number):
        self.total += float(value) * number
        self.count += number

    def compute(self):
        return self.total / self.count

    def forward(self, value, number):
        self.update(value, number)
        kept = self.total, self.count
        self.reset()
        self.update(value, number)
        batch = self.compute()
        self.total, self.count = kept
        return batch


f1, mean = F1(), {"size": Module()}


def evaluate(model, batch):
    x, y = batch
    output = model(x)
    f1.update(output.argmax(1), y)
    mean["size"](output.square().mean(), len(y))
    hits = output.argmax(1) == y
    chosen = y > 0
    return {
        "accuracy": hits.float().mean(), "loss": F.cross_entropy(output, y), "f1": f1, "size": mean["size"],
        "of_chosen": (hits[chosen].double().sum() / max(1, int(chosen.sum())), int(chosen.sum())),
    }  # fmt: skip


def expected(state_dict):
    model, (x, y) = mlp().eval(), classes(VAL)
    model.load_state_dict(state_dict)
    with torch.no_grad():
        output = model(x)
    hits, claimed, true = output.argmax(1) == y, output.argmax(1) == 1, y == 1
    return {
        "val_accuracy": hits.double().mean().item(),
        "val_loss": F.cross_entropy(output, y).item(),
        "val_f1": 2 * (claimed & true).sum().item() / (claimed.sum() + true.sum()).item(),
        "val_size": output.square().mean().item(),
        "val_of_chosen": hits[y > 0].double().mean().item(),
    }


class Stream(torch_data.IterableDataset):
    def __iter__(self):
        return iter(list(zip(*classes(VAL), strict=True)))


def measured(world, val, options):
    result, weights = train(world, mlp(), TRAIN, val=val, evaluate=evaluate, **OPTIONS | options)
    return result.history[-1], weights


@pytest.mark.parametrize(
    "val", [classes(VAL), torch_data.DataLoader(Stream(), batch_size=8)], ids=["tensors", "stream"]
)
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {}), (2, {}), (3, {}), (4, {}), (2, {"accumulate": 2}), (2, {"reproducible": True}),
        (2, {"strategy": "shard=2"}), (2, {"strategy": "tp=2"}), (2, {"strategy": "pp=2", "microbatches": 2}),
        (4, {"strategy": "dp=2,pp=2", "microbatches": 2}),
    ],
)  # fmt: skip
def test_numbers_and_objects_are_those_of_the_whole_set(run_ranks, val, ranks, options):
    """The numbers are means over samples, or over what their weight says; objects are updated by whole batches."""
    for row, weights in run_ranks(ranks, measured, val, options):
        found = {name: value for name, value in row.items() if name.startswith("val_") and name != "val_batches"}
        assert expected(weights) == pytest.approx(found, rel=1e-6)
        assert [8.0, 5.0] == row["val_batches"]


def test_bits_do_not_depend_on_the_number_of_ranks(run_ranks):
    """Under `reproducible`, what an evaluation gives has the same bits too."""
    rows = [run_ranks(ranks, measured, classes(VAL), {"reproducible": True})[0][0] for ranks in (1, 2, 3)]
    names = [name for name in rows[0] if name not in ("seconds", "val_batches", "val_size")]
    assert [[row[name] for name in names] for row in rows] == [[rows[0][name] for name in names]] * 3


def test_the_objects_of_the_notebook_stay_as_they_are():
    """A copy is updated, and each evaluation begins anew."""
    result, _ = alone(mlp(), TRAIN, val=classes(VAL), evaluate=evaluate, epochs=2, **OPTIONS)
    assert [[8.0, 5.0]] * 2 == [row["val_batches"] for row in result.history]
    assert ([], 0) == (f1.sizes, mean["size"].count)
    assert "update" not in vars(f1)


def noisy_step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x + torch.randn_like(x)), y)


class Pictures:
    """Updated picture by picture, and in some batches not at all; a histogram, which has no row for each sample."""

    def __init__(self):
        self.seen, self.counts = [], torch.zeros(3)

    def update(self, x=None, *, histogram=None):
        if x is not None:
            self.seen.append(float(x.double().sum()))
        if histogram is not None:
            self.counts = self.counts + histogram

    def compute(self):
        return {"seen": self.seen, "counts": self.counts}


pictures = Pictures()


def look_at_each(model, batch):
    x, y = batch
    for one, target in zip(x, y, strict=True):
        if target:
            pictures.update(one)
    pictures.update(histogram=torch.bincount(y, minlength=3))
    return {"pictures": pictures, "loss": F.cross_entropy(model(x), y)}


def looked_at(world, options):
    val = classes(VAL)
    result, weights = train(
        world, mlp(), TRAIN, step=noisy_step, optimizer=SGD, batch_size=8, val=val, evaluate=look_at_each, **options
    )
    return result.history[-1], weights


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {}), (2, {}), (3, {"accumulate": 2}), (2, {"strategy": "pp=2"}), (2, {"strategy": "tp=2"})],
)
def test_updates_of_any_form_come_in_order(run_ranks, ranks, options):
    """Several of a slice, with keywords, without a row for each sample; the model is called as evaluate calls it."""
    for row, weights in run_ranks(ranks, looked_at, options):
        (x, y), model = classes(VAL), mlp().eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            assert F.cross_entropy(model(x), y).item() == pytest.approx(row["val_loss"], rel=1e-6)
        assert [float(one.sum()) for one in x[y > 0]] == pytest.approx(row["val_seen"])
        assert torch.bincount(y, minlength=3).tolist() == row["val_counts"]


class Judge:
    """A method is as good as a function, and finds the objects of its own."""

    def __init__(self):
        self.score, self.bias = F1(), 0.0

    def judge(self, model, batch):
        self.score.update(model(batch[0]).argmax(1) + int(self.bias), batch[1])
        return {"score": self.score}

    def __call__(self, model, batch):
        return self.judge(model, batch)


@pytest.mark.parametrize("given", [Judge().judge, Judge()], ids=["a method", "an object"])
def test_objects_may_be_attributes(given):
    """Of the object whose method evaluates, or that is called."""
    result, weights = alone(mlp(), TRAIN, val=classes(VAL), evaluate=given, **OPTIONS)
    assert expected(weights)["val_f1"] == pytest.approx(result.history[-1]["val_f1"])


def no_mean(model, batch):
    return {"largest": model(batch[0]).max()}


def computes(model, batch):
    f1.update(model(batch[0]).argmax(1), batch[1])
    return {"f1": f1.compute()["f1"]}


def forgets(model, batch):
    f1.update(model(batch[0]).argmax(1), batch[1])
    return {"size": 1.0}


def made_inside(model, batch):
    score = F1()
    score.update(model(batch[0]).argmax(1), batch[1])
    return {"f1": score}


def never_updates(model, batch):
    return {"f1": f1}


def gives_twice(model, batch):
    f1.update(model(batch[0]).argmax(1), batch[1])
    return {"batches": 1.0, "f1": f1}


def two_values(model, batch):
    return {"pair": (0.5, 0.25)}


def a_number(model, batch):
    return 0.5


def a_tensor(model, batch):
    return {"hits": model(batch[0]).argmax(1) == batch[1]}


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (no_mean, r"^no_mean returns largest=.* for 8 samples, and .* as the mean over their halves"),
        (computes, r"^computes calls compute of f1 on one slice .* return the object itself, as in {\"f1\": f1}"),
        (forgets, r"^forgets updates f1, but does not return it"),
        (made_inside, r"^made_inside returned f1, an object that it does not find under a name of the notebook"),
        (two_values, r"^two_values returned a tuple for pair, which is \(mean, weight\)"),
        (a_number, r"^a_number returned a value of type float: return a dict of numbers, or of objects"),
        (a_tensor, r"a_tensor\['hits'\] is a tensor of shape \(8,\): end it with .mean\(\)"),
        (F1, r"^evaluate must be a callable evaluate\(model, batch\), not <class"),
    ],
)
def test_mistakes_are_sentences_before_the_first_update(function, sentence):
    """The model is as it was."""
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TaskError, match=sentence):
        alone(model, TRAIN, val=classes(VAL), evaluate=function, **OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"val": None}, r"^evaluate=evaluate has no data"),
        ({"metric": "mae"}, r"^give metric or evaluate, not both"),
    ],
)
def test_it_needs_data_and_no_metric(more, sentence):
    """Said before anything is trained."""
    with pytest.raises(TaskError, match=sentence):
        alone(mlp(), TRAIN, **OPTIONS | {"val": classes(VAL), "evaluate": evaluate} | more)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (never_updates, r"^never_updates returned f1, but has never called update of f1"),
        (gives_twice, r"^evaluate gives val_batches twice, as a number and by an object"),
    ],
)
def test_what_the_first_evaluation_shows_is_a_sentence(function, sentence):
    """Values that would be missing, or one in place of another."""
    with pytest.raises(TaskError, match=sentence):
        alone(mlp(), TRAIN, val=classes(VAL), evaluate=function, **OPTIONS)


def logs_accuracy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y), {"accuracy": 1.0}


def test_two_values_of_one_name_are_refused():
    """The metric's, and what the step logs on the validation data."""
    with pytest.raises(TaskError, match=r"^the metric and the step's log both give val_accuracy"):
        alone(mlp(), TRAIN, step=logs_accuracy, optimizer=SGD, val=classes(VAL), metric="accuracy")
