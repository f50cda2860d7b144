"""Models of transformers, unmodified: a dict as a batch, the model's own loss, on any mesh as in one process."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("transformers")

from hugging_face import CASES, T5
from hugging_families import FAMILIES
from problems import alone, train

import nbdist
from nbdist.errors import EngineError, PlanError, TaskError

ADAMW = functools.partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1, eps=1e-3)
MESHES = ["dp=2", "shard=2", "tp=2", "pp=2", "dp=2,pp=2"]
SAMPLES, VAL_SAMPLES, BATCH = 24, 10, 8


class Rows(Dataset):
    """A data set of dicts, as those of the `datasets` library are."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def trained(world: Any, name: str, change: Any = None, *, validate: bool = False, **options: Any) -> Any:
    """Three steps of a model: its history, and its tensors before and after. Alone where `world` is None."""
    warnings.simplefilter("ignore")
    case = CASES[name]
    model, data = case.model(), case.data(SAMPLES)
    data = data if change is None else change(model, data)
    if not isinstance(data, DataLoader):
        options |= {"batch_size": BATCH, "shuffle": False}
    options |= {"loss": None, "optimizer": ADAMW, "seed": 3, "val": case.data(VAL_SAMPLES) if validate else None}
    before = tensors(model)
    result, _ = alone(model, data, **options) if world is None else train(world, model, data, **options)
    return result.history[-1], before, tensors(model)


def on_meshes(world: Any, name: str, meshes: list[str]) -> Any:
    """`trained` on each mesh, or why it failed."""
    found = {}
    for mesh in meshes:
        try:
            found[mesh] = trained(world, name, strategy=mesh, **slices(mesh)[1])
        except (PlanError, TaskError) as error:
            found[mesh] = str(error)
    return found


def slices(mesh: str) -> tuple[int, dict[str, int]]:
    """Slices in a global batch on a mesh, and the options that cut it so."""
    degrees = {axis: int(degree) for axis, _, degree in (part.partition("=") for part in mesh.split(","))}
    replicas = degrees.get("dp", 1) * degrees.get("shard", 1)
    return 2 * replicas, {"microbatches": 2} if "pp" in degrees else {"accumulate": 2}


def tensors(model):
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


@functools.cache
def reference(name: str, accumulate: int) -> Any:
    return trained(None, name, accumulate=accumulate)


@pytest.fixture(scope="module")
def on_ranks(run_ranks):
    """What `on_meshes` found for a model; worlds of one size are one, for they load transformers anew."""

    @functools.cache
    def found(name: str, ranks: int) -> Any:
        meshes = [mesh for mesh in MESHES if math.prod(int(part[-1]) for part in mesh.split(",")) == ranks]
        return run_ranks(ranks, on_meshes, name, meshes)[0]

    return lambda name, mesh: found(name, math.prod(int(part[-1]) for part in mesh.split(",")))[mesh]


def assert_equal(expected, actual, *, statistics=True, rel=1e-9, atol=1e-9):
    """Losses and weights are those of one process, and training has changed most of them."""
    (history, before, after), (other_history, _, other_after) = expected, actual
    keys = {"steps", "samples", "loss", "val_loss"} & history.keys()
    assert {key: other_history[key] for key in keys} == pytest.approx({key: history[key] for key in keys}, rel=rel)
    learned = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(learned) > len(before) / 2
    assert after.keys() == other_after.keys()
    for name, value in after.items():
        # Each replica has statistics of its own slices; what is left is their mean.
        if statistics or not name.rpartition(".")[2].startswith(("running_", "num_batches_")):
            torch.testing.assert_close(other_after[name], value, rtol=0, atol=atol, msg=f"{name} differs")


@pytest.mark.hf
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_a_model_trains_as_in_one_process(on_ranks, name, mesh):
    """Keyword inputs, the model's own loss, its dropout, tied weights: to 1e-9 on every mesh."""
    found = on_ranks(name, mesh)
    assert not isinstance(found, str), found
    count, _ = slices(mesh)
    assert_equal(reference(name, count), found, statistics=count == 2)


@pytest.mark.parametrize("name", [*CASES, "T5"])
def test_a_model_goes_to_the_engines_and_back(cluster, name):
    """Unmodified, in float32, in a notebook's payload: the result of one process with the same slices."""
    case = T5 if name == "T5" else CASES[name]
    data = {key: c.float() if c.is_floating_point() else c for key, c in case.data(SAMPLES).items()}
    found = []
    for way, options in ((nbdist.train, {"accumulate": 2, "verbose": False, "threads": 1}), (cluster.train, {})):
        model = case.model(torch.float32)
        before = tensors(model)
        run = way(model, data, optimizer=ADAMW, batch_size=BATCH, seed=3, **options)
        found.append((run.history[-1], before, tensors(model)))
    assert_equal(*found, statistics=False, rel=1e-5, atol=1e-5)


NO_MEAN = "no mean over samples|not recognised as a mean"
REFUSED = {("Mixtral, balanced", mesh): NO_MEAN for mesh in ("dp=2", "shard=2", "pp=2")} | {
    ("CLIP (contrastive)", mesh): NO_MEAN for mesh in ("dp=2", "shard=2", "pp=2")
}  # both look at all samples of a batch together, so that a slice's loss is another one


@functools.cache
def whole_batches(name: str) -> Any:
    """Three steps of a loop as anybody writes it, without slices: the tensors."""
    case = FAMILIES[name]
    model, data = case.model(torch.float32), case.data(SAMPLES)
    optimizer = ADAMW(model.parameters())
    for rows in torch.arange(SAMPLES).split(BATCH):
        optimizer.zero_grad()
        model(**{key: column[rows] for key, column in data.items()})["loss"].backward()
        optimizer.step()
    return tensors(model)


@pytest.mark.hf
@pytest.mark.parametrize("mesh", MESHES[:4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_through_engines(cluster, name, mesh):
    """In float32, rows padded to many lengths: the weights of a plain loop over whole batches, or a sentence."""
    case = FAMILIES[name]
    model = case.model(torch.float32)
    before = tensors(model)
    options = {"optimizer": ADAMW, "batch_size": BATCH, "shuffle": False, "strategy": mesh, "threads": 1}
    if mesh == "pp=2":
        options["microbatches"] = 1 if name.startswith("Segformer") else 2  # BatchNorm sees a microbatch
    if (name, mesh) in REFUSED:
        with pytest.raises(EngineError, match=REFUSED[name, mesh]):
            cluster.train(model, case.data(SAMPLES), **options)
        return torch.testing.assert_close(tensors(model), before, rtol=0, atol=0)
    run = cluster.train(model, case.data(SAMPLES), sync_batchnorm=mesh in ("dp=2", "shard=2"), **options)
    assert "loss, " == run.plan.checked[:6], run.plan.checked
    after = tensors(model)
    assert sum(not torch.equal(value, after[key]) for key, value in before.items()) > len(before) / 2
    torch.testing.assert_close(after, whole_batches(name), rtol=1e-4, atol=2e-6)


def as_rows(_model, columns):
    """A data set of dicts in a DataLoader with torch's own collate."""
    return DataLoader(Rows(columns), batch_size=BATCH)


def with_checkpointing(model, columns):
    """Activations are computed again in backward, as transformers offers it."""
    model.gradient_checkpointing_enable()
    return columns


def without_mask(model, columns):
    """No padding; attention written out, and positions given."""
    model.set_attn_implementation("eager")
    places = torch.arange(columns["labels"].shape[1]).expand_as(columns["labels"]).clone()
    return {"input_ids": columns["input_ids"], "position_ids": places, "labels": columns["labels"]}


@pytest.mark.parametrize("name", ["GPT-2", "ResNet"])
def test_a_pipeline_evaluates_and_reads_rows(run_ranks, name):
    """Rows of dicts from a DataLoader, and in evaluation mode the loss of the model, its statistics and no dropout."""
    expected = trained(None, name, as_rows, validate=True, accumulate=2)
    assert "val_loss" in expected[0]
    options = {"validate": True, "strategy": "pp=2", "microbatches": 2}
    assert_equal(expected, run_ranks(2, functools.partial(trained, **options), name, as_rows)[0])


@pytest.mark.hf
@pytest.mark.parametrize("mesh", ["pp=2", "shard=2"])
@pytest.mark.parametrize("change", [with_checkpointing, without_mask])
def test_what_a_model_can_be_set_to(run_ranks, change, mesh):
    """Its ways to compute are the user's."""
    count, cut = slices(mesh)
    expected = trained(None, "GPT-2", change, accumulate=count)
    assert_equal(expected, run_ranks(2, functools.partial(trained, strategy=mesh, **cut), "GPT-2", change)[0])
