"""Checkpoints: made on one mesh, loaded on any other, to the bit."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from problems import alone, assert_same_bits, classes, mlp, train, weights
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core import checkpoint, strategies
from nbdist.core.axes import Axes
from nbdist.core.params import ParamTable
from nbdist.core.placement import Placement
from nbdist.core.world import World
from nbdist.errors import PeerLostError, PlanError, TaskError
from nbdist.plan import Mesh, Plan

BATCH, STEPS, WIDTH = 16, 2, 8
LOOP = importlib.import_module("nbdist.core.train")  # as an attribute, that name is the function


class Net(nn.Module):
    """Blocks that can be split any way; a tie over all of its length, running statistics, a scalar, frozen weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, WIDTH)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(4))
        self.downs = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(4))
        self.downs[3].weight = self.downs[0].weight
        self.ups[1].requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x):
        hidden = self.norms[0](self.first(x))
        for up, down in zip(self.ups, self.downs, strict=True):
            hidden = hidden + down(torch.tanh(up(hidden)))
        return self.last(self.norms[1](hidden) * self.scale)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


def adamw(parameters):
    """Two groups, one with a learning rate in a tensor."""
    first, rest = parameters[:4], parameters[4:]
    return torch.optim.AdamW(
        [{"params": first, "lr": 0.02, "betas": (0.8, 0.95)}, {"params": rest, "lr": torch.tensor(0.003)}], eps=1e-3
    )


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, fused=True)


def sgd(parameters):
    return torch.optim.SGD([{"params": parameters[5:], "lr": 0.02}, {"params": parameters[:5]}], lr=0.01, momentum=0.9)


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


def options_of(mesh):
    return {"strategy": mesh, "batch_size": BATCH, "steps": STEPS, **({"microbatches": 2} if "pp" in mesh else {})}


def train_on(world, mesh, folder, before):
    """Resume, save again what has been loaded, train, save; the kinds of strategies that did it."""
    kinds, apply = set(), strategies.apply

    def noted(*args):
        strategy = apply(*args)
        kinds.add(type(strategy).__name__)
        return strategy

    def load_and_save(place, table, optimizer, axes):
        checkpoint.load(place, table, optimizer, axes)
        again = f"{folder}/{Path(place).name}-again"
        os.makedirs(again, exist_ok=True)
        checkpoint.save(again, table, optimizer, axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "apply", noted)
        patch.setattr(LOOP, "load", load_and_save)
        for name, make in OPTIMIZERS.items():
            resume = f"{before}/{name}" if before else None
            _, after = train(
                world, net(), classes(64), optimizer=make, resume=resume, save=f"{folder}/{name}", **options_of(mesh)
            )
            if world.rank == 0:
                torch.save(after, f"{folder}/{name}.pt")
    return kinds


@pytest.fixture(scope="module")
def chain(run_ranks, tmp_path_factory):
    """A training that goes from mesh to mesh: the folder of each, and what strategy it had."""
    home = tmp_path_factory.mktemp("chain")
    folders, before, kinds = [], None, []
    for i, (mesh, channel) in enumerate(CHAIN):
        folder = home / str(i)
        folder.mkdir()
        ranks = Mesh.parse(mesh, _ranks(mesh)).size
        kinds.append(run_ranks(ranks, train_on, mesh, str(folder), before, channel=channel)[0])
        folders.append(str(folder))
        before = str(folder)
    return folders, kinds


def _ranks(mesh):
    return functools.reduce(lambda n, part: n * int(part.partition("=")[2]), mesh.split(","), 1)


def loaded(folder, name):
    """A checkpoint in one process: the model, its optimizer."""
    model = net()
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(9.0) if isinstance(group["lr"], torch.Tensor) else 9.0
    nbdist.load_checkpoint(folder, model, optimizer)
    return model, optimizer


def everything(model, optimizer):
    names = {id(p): n for n, p in model.named_parameters()}
    state = {f"{names[id(p)]}/{k}": v for p, own in optimizer.state.items() for k, v in own.items() if v is not None}
    groups = {
        f"{i}/{k}": torch.as_tensor(v)
        for i, group in enumerate(optimizer.param_groups)
        for k, v in group.items()
        if k != "params" and v is not None
    }
    return weights(model), state, groups


def test_the_strategies_are_all_there(chain):
    """The chain goes through each kind."""
    assert [{"Replicate"}, {"SharedWeights"}] == chain[1][:2]
    assert {"Replicate"} == chain[1][8]
    assert {"Composed"} == set.union(*chain[1][2:8])


@pytest.mark.parametrize("link", LINKS, ids=NAMES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_loaded_on_a_mesh_is_what_was_saved_on_another(chain, link, name):
    """Weights, buffers, optimizer state and settings, bit for bit."""
    folders, _ = chain
    before = everything(*loaded(f"{folders[link - 1]}/{name}", name))
    again = everything(*loaded(f"{folders[link]}/{name}-again", name))
    for expected, actual in zip(before, again, strict=True):
        assert_same_bits(expected, actual)
    assert before[1]  # there is a state
    if name != "sgd":
        assert {2.0 * link} == {v.item() for k, v in before[1].items() if k.endswith("step")}


@pytest.mark.parametrize("link", LINKS, ids=NAMES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_in_one_process(chain, link, name):
    """Resumed on a mesh, weights and state become what they do in one process that runs the same slices."""
    folders, _ = chain
    mesh = CHAIN[link][0]
    plan = Plan.create(ranks=_ranks(mesh), cores=1, **options_of(mesh))
    model, optimizer = loaded(f"{folders[link - 1]}/{name}", name)
    alone(model, classes(64), optimizer=optimizer, steps=STEPS, batch_size=BATCH, accumulate=plan.slices)
    there = loaded(f"{folders[link]}/{name}", name)
    assert_same_bits(torch.load(f"{folders[link]}/{name}.pt"), weights(there[0]))
    for expected, actual in zip(everything(model, optimizer), everything(*there), strict=True):
        if plan.mesh.data > 1:  # running statistics are means over replicas
            expected, actual = without_statistics(expected), without_statistics(actual)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def without_statistics(tensors):
    return {name: tensor for name, tensor in tensors.items() if "running" not in name and "num_batches" not in name}


def test_each_piece_is_written_once(chain):
    """However many ranks hold it; and all of them together are the model and its state."""
    for folder in chain[0]:
        for name in OPTIMIZERS:
            place = Path(folder, name)
            assert {".safetensors", ".json"} == {file.suffix for file in place.iterdir()}
            keys, numel = [], 0
            for file in place.glob("*.safetensors"):
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - it is no dict
                        keys.append(key)
                        numel += opened.get_tensor(key).numel()
            assert len(keys) == len(set(keys))
            assert sorted(keys) == sorted(json.loads((place / "checkpoint.json").read_text())["files"])
            model, optimizer = loaded(str(place), name)
            state = [v for own in optimizer.state.values() for v in own.values() if v is not None]
            whole = sum(t.numel() for t in [*model.parameters(), *model.buffers(), *state])
            assert whole <= numel <= whole + 2 * 3 * len(keys)  # shards are padded


def test_nothing_is_pickled(chain, monkeypatch):
    """Reading a checkpoint runs no code of whoever made it."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("unpickled")

    for module, name in [(pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    loaded(f"{chain[0][-1]}/adamw", "adamw")


def save_alone(folder, model, optimizer):
    checkpoint.save(str(folder), ParamTable.of(model), optimizer, Axes(World(), Mesh()))


def stepped(make=fused, model=None):
    model = net() if model is None else model
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("late", ["save_file", "_values", "_replace_index", "os.replace"])
def test_a_crash_leaves_the_old_checkpoint(tmp_path, monkeypatch, late):
    """Whenever it comes; and the next save tidies up after it."""
    model, optimizer = stepped()
    save_alone(tmp_path, model, optimizer)
    before = weights(model)

    def crash(*args, **kwargs):
        if late == "save_file":
            args[1].write_bytes(b"half a file")
        raise KeyboardInterrupt

    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(os if late == "os.replace" else checkpoint, late.removeprefix("os."), crash)
        with pytest.raises(KeyboardInterrupt):
            save_alone(tmp_path, model, optimizer)
    again = net()
    nbdist.load_checkpoint(str(tmp_path), again)
    assert_same_bits(before, weights(again))
    own = tmp_path / "model-rank0.safetensors"
    own.write_text("somebody else's")
    save_alone(tmp_path, model, optimizer)
    nbdist.load_checkpoint(str(tmp_path), again)
    assert_same_bits(weights(model), weights(again))
    assert len(list(tmp_path.iterdir())) == 3
    assert own.exists()


def test_views_and_odd_layouts(tmp_path):
    """Buffers that share memory, channels last, nothing at all, half precision: all come back, strides too."""

    def make():
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(3, 4).bfloat16(), nn.Linear(0, 4))
        model.to(memory_format=torch.channels_last)
        model.register_buffer("all", torch.arange(6))
        model.register_buffer("some", model.all[:3])
        model.register_buffer("scratch", torch.randn(2), persistent=False)
        model.register_buffer("flags", torch.tensor([True, False]).expand(3, 2))
        return model

    model, optimizer = stepped(lambda p: torch.optim.AdamW(p, lr=0.1), make())
    save_alone(tmp_path, model, optimizer)
    again = make()
    again.flags = again.flags.clone()
    strides = [p.stride() for p in again.parameters()]
    other = torch.optim.AdamW(again.parameters())
    nbdist.load_checkpoint(str(tmp_path), again, other)
    for a, b in zip([*model.parameters(), *model.buffers()], [*again.parameters(), *again.buffers()], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert strides == [p.stride() for p in again.parameters()]
    assert all(other.state[p]["exp_avg"].stride() == p.stride() for p in again.parameters())
    assert other.state[again[0].weight]["step"].dtype == torch.float32
    assert other.param_groups[0]["lr"] == 0.1
    other.step()


@pytest.mark.parametrize("name", sorted(set(strategies.OPTIMIZERS) - {"muon"}))
def test_every_optimizer_of_torch(tmp_path, name):
    """Saved and loaded, it goes on as if nothing had been."""
    model, optimizer = stepped(strategies.OPTIMIZERS[name])
    save_alone(tmp_path, model, optimizer)
    again = net()
    other = strategies.OPTIMIZERS[name]([p for p in again.parameters() if p.requires_grad])
    nbdist.load_checkpoint(str(tmp_path), again, other)
    for own, made in ((model, optimizer), (again, other)):
        for parameter in made.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 0.5)
        made.step()
        assert own
    assert_same_bits(weights(model), weights(again))


def test_another_dtype(tmp_path):
    """Weights and state follow the model that they are loaded into."""
    model, optimizer = stepped()
    save_alone(tmp_path, model, optimizer)
    again, other = stepped(model=net().float())
    nbdist.load_checkpoint(str(tmp_path), again, other)
    assert {torch.float32} == {v.dtype for state in other.state.values() for v in state.values()}
    other.step()


class Noting(torch.optim.SGD):
    """An optimizer that keeps what a checkpoint cannot hold."""

    def __init__(self, params, lr=0.1, kept=None):
        super().__init__(params, lr=lr)
        self.kept = kept

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["note"] = self.kept


def test_state_that_is_no_tensor(tmp_path):
    """Numbers, strings, lists and dicts come back."""
    kept = {"a": [1, 2.5, None], "b": "text"}
    model, optimizer = stepped(functools.partial(Noting, kept=kept))
    save_alone(tmp_path, model, optimizer)
    again = net()
    other = Noting([p for p in again.parameters() if p.requires_grad])
    nbdist.load_checkpoint(str(tmp_path), again, other)
    assert all(state["note"] == kept for state in other.state.values())


@pytest.mark.parametrize("kept", [object(), {1: 2}, {"a": {1}}], ids=["object", "numbers as keys", "a set"])
def test_state_that_json_cannot_hold(tmp_path, kept):
    """It is said after the first step, not at the end."""
    steps = []
    with pytest.raises(TaskError, match=r"the optimizer's note is a \w+, which a checkpoint cannot hold"):
        alone(
            mlp(), classes(16), optimizer=functools.partial(Noting, kept=kept), save=str(tmp_path / "new"), steps=3,
            batch_size=8, loss=lambda output, y: steps.append(1) or F.cross_entropy(output, y),
        )  # fmt: skip
    assert 1 == len(steps)


def test_mistakes_are_said_before_anything_is_touched(tmp_path, monkeypatch):
    """No checkpoint, a broken one, another model, other groups: in every way in."""
    model, optimizer = stepped(sgd)
    folder = tmp_path / "good"
    folder.mkdir()
    save_alone(folder, model, optimizer)
    monkeypatch.setattr("nbdist.core.api.fit", lambda *a, **k: pytest.fail("it began"))

    def refused(place, error, match, model, optimizer=fused):
        before = weights(model)
        made = optimizer([p for p in model.parameters() if p.requires_grad])
        with pytest.raises(error, match=match):
            nbdist.load_checkpoint(str(place), model, made)
        with pytest.raises(error, match=match):
            nbdist.train(model, classes(16), loss="cross_entropy", optimizer=made, resume=str(place), device="cpu")
        assert_same_bits(before, weights(model))
        assert not made.state

    refused(tmp_path / "none", PlanError, "holds no checkpoint .* give the folder that save named", net())
    refused(folder, TaskError, r"another model's: 0.weight \[8, 6\] is not in it", mlp())
    wider = net()
    wider.last = nn.Linear(WIDTH, 4)
    refused(folder, TaskError, r"last.weight \[4, 8\] has shape \[3, 8\] in it", wider)
    less = net()
    less.scale = None
    less.register_parameter("scale", None)
    refused(folder, TaskError, "scale is only in it", less)
    refused(folder, TaskError, "has other parameter groups", net())
    index = folder / "checkpoint.json"
    text = index.read_text()
    index.write_text(text.replace('"format": 1', '"format": 99'))
    refused(folder, PlanError, "has format 99: this nbdist reads format 1", net(), sgd)
    index.write_text(text[:-20])
    refused(folder, PlanError, "none that nbdist wrote", net(), sgd)
    index.write_text(text)
    next(folder.glob("*.safetensors")).unlink()
    refused(folder, PlanError, "is not whole", net(), sgd)


def test_a_folder_that_cannot_be_written(tmp_path):
    """It is said before the training."""
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(PlanError, match=r"rank 0 cannot write to save='.*file/inside' \(.*\): name another folder"):
        alone(
            mlp(), classes(16), optimizer="sgd", save=str(tmp_path / "file" / "inside"), batch_size=8,
            loss=lambda output, y: steps.append(1) or F.cross_entropy(output, y),
        )  # fmt: skip
    assert not steps


def save_where_one_cannot(world, folder):
    if world.rank == 1:
        checkpoint.tempfile = None  # as bad as a full disk
        checkpoint.tempfile = type("Full", (), {"TemporaryFile": staticmethod(_full)})
    errors = []
    for options in ({"save": folder}, {"save": folder, "strategy": "pipeline"}):
        try:
            train(world, mlp(), classes(16), optimizer="sgd", batch_size=8, **options)
        except PlanError as error:
            errors.append(str(error))
    return errors


class Factored(torch.optim.SGD):
    """Keeps a state that has not its parameter's shape."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = parameter.detach().reshape(len(parameter), -1).sum(1)[:1]


def test_state_that_cannot_be_cut():
    """It is said after the first step, where parameters are in parts."""
    model, optimizer = stepped(functools.partial(Factored, lr=0.1), mlp())
    table = ParamTable.of(model)
    checkpoint.check_state(table, optimizer)
    table.placements["0.weight"] = Placement(layout=model[0].weight.to("meta"), sharded=True)
    with pytest.raises(TaskError, match=r"the optimizer's rows of 0.weight has shape \[1\], which is not its param"):
        checkpoint.check_state(table, optimizer)


def save_on_two_ranks(world, folder):
    """Rank 1 fails while it writes the second one: the first one's weights, and the error."""
    model = mlp()
    train(world, model, classes(16), optimizer="sgd", batch_size=8, save=folder, strategy="shard")
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(checkpoint, "save_file", _full)
        try:
            train(world, mlp(), classes(16), optimizer="sgd", batch_size=8, save=folder, strategy="shard", seed=5)
        except (OSError, PeerLostError) as error:
            world.leave()
            return weights(model), type(error).__name__


def test_a_rank_that_cannot_write_at_the_end(run_ranks, tmp_path):
    """The others hear of it, and the old checkpoint is still there."""
    (kept, heard), (_, cause) = run_ranks(2, save_on_two_ranks, str(tmp_path))
    assert ("PeerLostError", "OSError") == (heard, cause)
    again = mlp()
    nbdist.load_checkpoint(str(tmp_path), again)
    assert_same_bits(kept, weights(again))


def _full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def test_all_ranks_know_that_one_cannot_write(run_ranks, tmp_path):
    """They say the same, at once."""
    first, second = run_ranks(2, save_where_one_cannot, str(tmp_path / "new"))
    assert first == second
    assert 2 == len(first)
    assert "rank 1 cannot write" in first[0]


def test_a_large_model_is_quick(tmp_path):
    """100 MB are written and read in the time of a disk."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(25)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    began_s = time.perf_counter()
    save_alone(tmp_path, model, optimizer)
    written_s = time.perf_counter()
    nbdist.load_checkpoint(str(tmp_path), model, optimizer)
    read_s = time.perf_counter() - written_s
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    print(f"{size / 1e6:.0f} MB: save {written_s - began_s:.2f} s, load {read_s:.2f} s")
    assert size < 1.01 * sum(p.nbytes for p in model.parameters())
    assert read_s < 10
