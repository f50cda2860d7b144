"""Checkpoints: saved on one mesh and resumed on any other, to the bit; and how they are written."""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from problems import ADAMW, alone, assert_same_bits, classes, mlp, train, weights
from safetensors import safe_open
from saved_checkpoints import adamw, everything, fused, keep, loaded, net, newest, over, sgd
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.state.checkpoint_reader import MANIFEST, NEWEST, CheckpointReader, checkpoints
from nbdist.core.state.checkpoint_writer import THREAD, check_resume
from nbdist.core.strategies import choice
from nbdist.errors import PlanError
from nbdist.plan import Mesh, Plan

BATCH, STEPS = 16, 2
OPTIMIZERS = {"adamw": adamw, "fused": fused, "sgd": sgd}
CHAIN = [
    ("dp=1", "shared memory"),
    ("dp=2", "shared weights"),
    ("pp=2", "shared memory"),
    ("tp=2", "shared memory"),
    ("shard=2", "process group"),
    ("dp=2,pp=2", "shared memory"),
    ("shard=2,pp=2", "shared memory"),
    ("pp=2,tp=2", "shared memory"),
    ("dp=2", "process group"),
    ("shard=2", "shared memory"),
    ("dp=1", "shared memory"),
]
LINKS = list(range(1, len(CHAIN)))
NAMES = [f"{a[0]} to {b[0]}" for a, b in itertools.pairwise(CHAIN)]


def options_of(link):
    mesh = CHAIN[link][0]
    return {"strategy": mesh, "batch_size": BATCH, "check": "no", **({"microbatches": 2} if "pp" in mesh else {})}


def train_on(world, link, folder, before):
    """Save what was loaded, then train on and save that; the strategies used."""
    kinds, apply = set(), choice.apply

    def noted(*args):
        strategy = apply(*args)
        kinds.add(type(strategy).__name__)
        return strategy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "apply", noted)
        for name, make in OPTIMIZERS.items():
            options = {"optimizer": make, "resume": f"{before}/{name}" if before else None, **options_of(link)}
            if before:  # all steps are complete
                train(world, net(), classes(64), checkpoint=f"{folder}/{name}-again", steps=STEPS * link, **options)
            steps = STEPS * (link + 1)
            _, after = train(world, net(), classes(64), checkpoint=f"{folder}/{name}", steps=steps, **options)
            if world.rank == 0:
                torch.save(after, f"{folder}/{name}.pt")
    return kinds


@pytest.fixture(scope="module")
def chain(run_ranks, tmp_path_factory):
    """A training that is resumed on mesh after mesh: the folder and the strategy of each."""
    home = tmp_path_factory.mktemp("chain")
    folders, before, kinds = [], None, []
    for link, (mesh, channel) in enumerate(CHAIN):
        folder = home / str(link)
        folder.mkdir()
        kinds.append(run_ranks(ranks_of(mesh), train_on, link, str(folder), before, channel=channel)[0])
        folders.append(str(folder))
        before = str(folder)
    return folders, kinds


def ranks_of(mesh):
    return functools.reduce(lambda n, part: n * int(part.partition("=")[2]), mesh.split(","), 1)


@pytest.mark.programs
def test_the_strategies_are_all_there(chain):
    """The chain uses each kind of strategy."""
    assert [{"DataParallel"}, {"SharedWeights"}] == chain[1][:2]
    assert {"DataParallel"} == chain[1][8]
    assert {"MeshParallel"} == set.union(*chain[1][2:8])


@pytest.mark.programs
@pytest.mark.parametrize("link", LINKS, ids=NAMES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_loaded_on_a_mesh_is_what_was_written_on_another(chain, link, name):
    """Weights, buffers, optimizer state and settings, bit for bit."""
    folders, _ = chain
    before = everything(*loaded(f"{folders[link - 1]}/{name}", OPTIMIZERS[name]))
    again = everything(*loaded(f"{folders[link]}/{name}-again", OPTIMIZERS[name]))
    for expected, actual in zip(before, again, strict=True):
        assert_same_bits(expected, actual)
    assert before[1]  # there is a state
    if name != "sgd":
        assert {float(STEPS * link)} == {v.item() for k, v in before[1].items() if k.endswith("step")}


@pytest.mark.programs
@pytest.mark.parametrize("link", LINKS, ids=NAMES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_as_in_one_process(chain, link, name):
    """On each mesh, weights and state become those of one process that runs the same slices."""
    folders, _ = chain
    mesh = CHAIN[link][0]
    plan = Plan.create(ranks=ranks_of(mesh), cores=1, **options_of(link))
    model, optimizer = loaded(f"{folders[link - 1]}/{name}", OPTIMIZERS[name])
    result, _ = alone(
        model, classes(64), optimizer=optimizer, steps=STEPS * (link + 1), batch_size=BATCH, accumulate=plan.slices,
        resume=f"{folders[link - 1]}/{name}", check="no",
    )  # fmt: skip
    there = loaded(f"{folders[link]}/{name}", OPTIMIZERS[name])
    assert STEPS * (link + 1) == sum(row["steps"] for row in result.history)
    assert_same_bits(torch.load(f"{folders[link]}/{name}.pt"), weights(there[0]))
    for expected, actual in zip(everything(model, optimizer), everything(*there), strict=True):
        if plan.mesh.data > 1:  # running statistics are means over replicas
            expected, actual = without_statistics(expected), without_statistics(actual)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def without_statistics(tensors):
    return {name: tensor for name, tensor in tensors.items() if "running" not in name and "num_batches" not in name}


def keys_in(place):
    """Each key of a checkpoint, how often it is there, and numbers under all of them."""
    keys, numel = Counter(), 0
    for file in place.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                keys[key] += 1
                numel += opened.get_tensor(key).numel()
    return keys, numel


@pytest.mark.programs
def test_each_shard_is_written_once(chain):
    """However many ranks hold it; running statistics once per data coordinate; small counters may be repeated."""
    for (mesh, _), folder in zip(CHAIN, chain[0], strict=True):
        for name, make in OPTIMIZERS.items():
            place = newest(f"{folder}/{name}")
            keys, numel = keys_in(place)
            model, optimizer = loaded(place, make)
            names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
            assert names == {key.split("|")[0] for key in keys}
            assert {1} == {count for key, count in keys.items() if key.split("|")[1] != "step"}
            data = Mesh.parse(mesh, ranks_of(mesh)).data
            shares = Counter(key.split("|")[0] for key in keys if "running_mean" in key)
            assert {data} == {*shares.values()}
            state = [v for own in optimizer.state.values() for v in own.values() if v is not None]
            once = sum(t.numel() for t in [*model.parameters(), *state])
            buffers = sum(b.numel() for b in model.buffers())
            assert once + buffers <= numel <= once + data * buffers + 2 * 4 * len(keys)  # shards are padded


@pytest.mark.programs
def test_a_checkpoint_is_a_file_per_rank_and_one_of_json(chain):
    """And beside the checkpoints `newest.json`; nothing else."""
    folder = Path(chain[0][1], "adamw")
    assert {NEWEST, newest(folder).name} == {path.name for path in folder.iterdir()}
    files = {"rank0.safetensors", "rank1.safetensors"}
    reported = json.loads((newest(folder) / MANIFEST).read_text())["files"]
    written = {path.name for path in newest(folder).iterdir()}
    assert {*reported, MANIFEST} == written
    assert files <= written
    assert {".safetensors", ".json"} == {Path(name).suffix for name in written}


@pytest.mark.programs
def test_nothing_is_pickled(chain, monkeypatch):
    """Reading a checkpoint runs no code from it."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("unpickled")

    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    loaded(f"{chain[0][-1]}/adamw", adamw)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"checkpoint_keep": 9}, ["6"]),
        ({"checkpoint_every": 2, "checkpoint_keep": 9}, ["2", "4", "6-end"]),
        ({"checkpoint_every": 4, "checkpoint_keep": 9}, ["4", "6"]),
        ({"checkpoint_every": 2}, ["2", "4", "6-end"]),
        ({"checkpoint_every": 2, "checkpoint_keep": 2}, ["4", "6-end"]),
        ({"checkpoint_every": 1, "checkpoint_keep": 9}, ["1", "3", "5", "6"]),  # it is published in the step after
        ({"checkpoint_every": 1, "checkpoint_keep": 1}, ["6"]),
        ({"checkpoint_every": "0.000001s", "checkpoint_keep": 9}, ["1", "3", "5", "6"]),
        ({"checkpoint_every": "1h", "checkpoint_keep": 9}, ["6"]),
    ],
)
def test_which_checkpoints_there_are(tmp_path, options, expected):
    """One at the end, those in between by the options, and of all of them the newest K."""
    alone(mlp(), classes(64), optimizer=ADAMW, steps=6, batch_size=8, loss=waiting, checkpoint=str(tmp_path), **options)
    assert expected == [name.partition("-step")[2].lstrip("0") for name in checkpoints(tmp_path)]
    assert {NEWEST, *checkpoints(tmp_path)} == {path.name for path in tmp_path.iterdir()}


def waiting(output, target):
    """A loss that waits for the writing thread, so that no checkpoint has to wait for the one before."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()
    return F.cross_entropy(output, target)


def test_writing_in_the_background_changes_no_bit(run_on_each_channel, tmp_path):
    """A checkpoint after every step or none: the same weights; one that is due during another's write comes later."""
    results = run_on_each_channel(2, with_and_without, str(tmp_path))
    for expected, actual in results:
        assert_same_bits(expected, actual)
    again = mlp(dropout=0.2)
    nbdist.load_checkpoint(str(tmp_path), again)
    assert_same_bits(results[0][0], weights(again))


def with_and_without(world, folder):
    options = {"optimizer": ADAMW, "batch_size": 16, "epochs": 5}
    _, expected = train(world, mlp(dropout=0.2), classes(80), **options)
    _, actual = train(
        world, mlp(dropout=0.2), classes(80), checkpoint=folder, checkpoint_every=1, checkpoint_keep=2, **options
    )
    return expected, actual


def test_a_folder_that_cannot_be_written(tmp_path):
    """The error comes before the training."""
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(PlanError, match=r"rank 0 cannot write to checkpoint='.*file/inside' \(.*\): name another fold"):
        alone(
            mlp(), classes(16), optimizer="sgd", checkpoint=str(tmp_path / "file" / "inside"), batch_size=8,
            loss=lambda output, y: steps.append(1) or F.cross_entropy(output, y),
        )  # fmt: skip
    assert not steps


def refused_on_one(world, folder):
    """Rank 1 gets another folder, below a file."""
    errors = []
    for strategy in ("data", "pipeline"):
        name = folder if world.rank == 0 else f"{folder}/file/inside"
        try:
            train(world, mlp(), classes(16), optimizer="sgd", batch_size=8, checkpoint=name, strategy=strategy)
        except PlanError as error:
            errors.append(str(error))
    return errors


def test_all_ranks_report_that_one_cannot_write(run_ranks, tmp_path):
    """With the same error, at once."""
    (tmp_path / "file").write_text("")
    first, second = run_ranks(2, refused_on_one, str(tmp_path))
    assert first == second
    assert 2 == len(first)
    assert "rank 1 cannot write" in first[0]


def test_a_run_that_was_cut_off_is_tidied_up_after(tmp_path):
    """The next run removes unpublished checkpoints; published ones and other files stay."""
    keep(tmp_path, mlp(), "sgd")
    counted = newest(tmp_path).name
    half, whole = tmp_path / "0123abcd-step00000007", tmp_path / "0123abcd-step00000008"
    for place in (half, whole):
        place.mkdir()
        (place / "rank0.safetensors").write_text("half a file")
    (whole / MANIFEST).write_text("{}")
    (tmp_path / "mine").mkdir()
    keep(tmp_path, mlp(), "sgd")
    assert {NEWEST, "mine", counted, newest(tmp_path).name} == {path.name for path in tmp_path.iterdir()}


def test_without_newest_json_checkpoints_are_not_removed(tmp_path):
    """If it is lost or damaged, all checkpoints that may be complete stay."""
    keep(tmp_path, mlp(), "sgd")
    counted = newest(tmp_path)
    (tmp_path / NEWEST).unlink()
    keep(tmp_path, mlp(), "sgd")
    assert counted.exists()
    (tmp_path / NEWEST).write_text("{")
    keep(tmp_path, mlp(), "sgd")
    assert counted.exists()
    nbdist.load_checkpoint(str(counted), mlp())


def test_a_large_model_takes_its_size(tmp_path):
    """100 MB of state take hardly more on disk."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(25)))
    keep(tmp_path, model, "sgd")
    before = weights(model)
    nbdist.load_checkpoint(str(tmp_path), model)
    assert_same_bits(before, weights(model))
    size = sum(file.stat().st_size for file in newest(tmp_path).iterdir())
    assert size < 1.01 * sum(p.nbytes for p in model.parameters())


def test_whether_a_run_can_resume_is_seen_without_a_hash(tmp_path, monkeypatch):
    """From lengths and headers: the ranks hash each file once, when they load it."""
    keep(tmp_path, net(), fused)
    monkeypatch.setattr(CheckpointReader, "hash_files", lambda *_: pytest.fail("it hashes"))
    model = net()
    check_resume(Plan.create(ranks=1, cores=1, resume=str(tmp_path), steps=2), model, {"": over(fused, model)})
