"""Prediction: the outputs for a data set, in its order, each sample once, on any mesh."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from problems import FEATURES, classes, seeded
from torch import nn
from torch.utils import data as torch_data

from nbdist.core.comm.world import World
from nbdist.core.predict import predict
from nbdist.core.process import memory
from nbdist.core.task.prediction import ForwardStep, prediction_task
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.telemetry import Noted, Sink

MESHES = {
    "dp=1": 1,
    "dp=2": 2,
    "shard=2": 2,
    "pp=2": 2,
    "tp=2": 2,
    "dp=3": 3,
    "dp=4": 4,
    "dp=2,pp=2": 4,
    "dp=2,shard=2": 4,
}
SAMPLES = 29


class Kept(Sink):
    """Keeps events."""

    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)


class Output(OrderedDict):
    """A model's output as libraries have it."""


torch.utils._pytree.register_pytree_node(
    Output, lambda output: (list(output.values()), list(output)), lambda values, keys: Output(zip(keys, values)),  # noqa: B905
    serialized_type_name="test_predict.Output",
)  # fmt: skip


class Scores(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Nests(nn.Module):
    """Returns a nest of the kind `form`, from a batch that may be a dict; a loss where it gets labels."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(FEATURES, 8), nn.Linear(8, 3), form
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x, labels=None):
        hidden = self.drop(self.norm(self.a(x))).tanh()
        scores = self.b(hidden)
        if self.form == "tuple":
            return scores, (hidden, scores.argmax(-1))
        if self.form == "dict":
            return {"scores": scores, "hidden": [hidden, scores]}
        if self.form == "output":
            found = Output(loss=scores.mean()) if labels is not None else Output()
            return Output({**found, "logits": scores, "hidden": hidden})
        return scores


class Samples(torch_data.Dataset):
    def __init__(self, form="tuple"):
        self.x, self.y = classes(SAMPLES)
        self.form = form

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        if self.form == "x":
            return self.x[i]
        return {"x": self.x[i], "labels": self.y[i]} if self.form == "dict" else (self.x[i], self.y[i])


class Stream(torch_data.IterableDataset):
    def __iter__(self):
        return iter(Samples())


DATA = {
    "tensors": classes(SAMPLES),
    "a tensor": classes(SAMPLES)[0],
    "a dict": {"x": classes(SAMPLES)[0], "labels": classes(SAMPLES)[1]},
    "a data set": Samples(),
    "inputs alone": Samples("x"),
    "dicts": Samples("dict"),
    "a loader": torch_data.DataLoader(Samples(), batch_size=7, shuffle=True, drop_last=True),
    "a stream": torch_data.DataLoader(Stream(), batch_size=7),
    "a subset": torch_data.Subset(Samples(), range(SAMPLES)),
}


def model_of(form):
    model = seeded(lambda: Nests(form), torch.float64)
    model.norm.running_mean.fill_(0.1)
    return model


def run(world, model, data, sinks=(), **options):
    task = prediction_task(model, data, batch_size=options.pop("batch_size", None))
    plan = Plan.create(ranks=world.size, cores=1, threads=1, **task.options, **options)
    return predict(task, plan, world, sinks=sinks)


def predict_forms(world, mesh, forms):
    options = {"strategy": mesh, **({"split_at": ["b"]} if "pp" in mesh else {})}
    return [run(world, model_of(output), DATA[data], **options) for output, data in forms]


FORMS = [("tensor", name) for name in DATA] + [("tuple", "tensors"), ("dict", "a stream"), ("output", "dicts")]


@pytest.mark.parametrize("mesh", MESHES)
def test_outputs_are_those_of_one_process(run_ranks, mesh):
    """In the data's order, each sample once, whatever form the data and the output have; on every rank."""
    forms = FORMS if mesh in ("dp=1", "dp=3") else [FORMS[0], *FORMS[-2:]]
    found = run_ranks(MESHES[mesh], predict_forms, mesh, forms)
    for (form, _), *of_ranks in zip(forms, *found, strict=True):
        with torch.no_grad():
            expected = model_of(form).eval()(classes(SAMPLES)[0])
        for outputs in of_ranks:
            assert type(expected) is type(outputs)
            torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
            assert not any(leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves(outputs))


def alone(model, data, **options):
    return run(World(), model, data, **options)


def test_the_model_stays_as_it_is():
    """Its modes, its weights, and what is trained of it."""
    model = model_of("tensor")
    model.drop.eval()
    model.a.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone(model, DATA["tensors"])
    assert (True, False) == (model.training, model.drop.training)
    assert ["a.weight"] == [name for name, p in model.named_parameters() if not p.requires_grad]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_frozen_model_predicts():
    """Also one without parameters."""
    model = model_of("tensor").requires_grad_(False)
    assert (SAMPLES, 3) == alone(model, DATA["tensors"]).shape
    assert torch.equal(classes(SAMPLES)[0].tanh(), alone(nn.Tanh(), DATA["tensors"]))


def test_what_has_no_row_for_each_sample_is_left_out_and_noted():
    """A loss; the note names it."""
    sink = Kept()
    outputs = alone(model_of("output"), DATA["dicts"], sinks=[sink])
    assert ["logits", "hidden"] == list(outputs)
    notes = [event.text for event in sink.events if isinstance(event, Noted)]
    assert ["left out, having no row for each sample: loss"] == notes


class Means(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = nn.Linear(FEATURES, 2, dtype=torch.float64), kind

    def forward(self, x):
        y = self.inner(x)
        return {"mean": y.mean(), "ragged": y[:, :, None].expand(-1, -1, len(x)), "text": "words"}[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("mean", "the model's outputs are numbers, without a row for each sample"),
     ("ragged", r"outputs differ in shape from slice to slice, \(8, 2, 8\) and \(5, 2, 5\), .*: pad all batches"),
     ],
)  # fmt: skip
def test_outputs_that_cannot_be_put_together_are_refused(kind, message):
    """In one sentence."""
    with pytest.raises(TaskError, match=message):
        alone(Means(kind), DATA["tensors"], batch_size=8)


def test_data_that_cannot_be_predicted_on_is_refused():
    """An unknown key, a random order, no data at all."""
    with pytest.raises(TaskError, match=r"a batch of data has z, which the model's forward does not take \(.*\)"):
        alone(model_of("tensor"), {"x": classes(3)[0], "z": classes(3)[1]})
    sampler = torch_data.RandomSampler(Samples(), replacement=True)
    with pytest.raises(TaskError, match=r"data reads in the random order of RandomSampler.*: give data\.dataset"):
        alone(model_of("tensor"), torch_data.DataLoader(Samples(), sampler=sampler))
    with pytest.raises(PlanError, match="batch_size=3 contradicts the DataLoader data, which has 7"):
        alone(model_of("tensor"), DATA["a loader"], batch_size=3)
    with pytest.raises(TaskError, match=r"model is a class, not a model: write Nests\(\)"):
        alone(Nests, DATA["tensors"])


def test_outputs_that_do_not_fit_into_memory_are_refused(monkeypatch, tmp_path):
    """After the first batch."""
    (tmp_path / "meminfo").write_text("MemAvailable: 0 kB\n")
    monkeypatch.setattr(memory, "_FREE", tmp_path / "meminfo")
    with pytest.raises(TaskError, match=r"the model's outputs take .* GiB are free: let the model return less"):
        alone(model_of("tensor"), DATA["tensors"])


class Two(nn.Module):
    def forward(self, a, b):
        return a + b


def test_a_tuple_without_a_target_is_passed_whole():
    """Where forward requires all of it; a target key of a dict is left out where forward takes none."""
    assert 3 == ForwardStep(Two(), "data")(Two(), (1, 2))
    assert 3 == ForwardStep(Two(), "data")(Two(), [1, 2, 9])
    assert 3 == ForwardStep(Two(), "data")(Two(), {"a": 1, "b": 2, "labels": 9})
    assert 4 == ForwardStep(nn.Identity(), "data")(nn.Identity(), [4, 2])
