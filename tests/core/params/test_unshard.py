"""The model after training: whole and ordinary, or sharded until it is gathered."""

from __future__ import annotations

import contextlib

import pytest
import torch
from problems import alone, assert_same_bits, classes, seeded, train, weights
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.comm.world import World
from nbdist.errors import NbdistError, PeerLostError, TaskError
from nbdist.plan import Mesh

MESHES = [
    (Mesh(dp=2), "shared weights"),
    (Mesh(pp=2), "shared memory"),
    (Mesh(tp=2), "shared memory"),
    (Mesh(shard=2), "shared memory"),
    (Mesh(shard=2, pp=2), "shared memory"),
    (Mesh(pp=2, tp=2), "process group"),
]
SPLIT = MESHES[1:]
HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith("hooks")]


class Net(nn.Module):
    """With tied weights, running statistics, a frozen layer, and channels-last weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 1).to(memory_format=torch.channels_last)
        self.ups = nn.ModuleList(nn.Linear(8, 64) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(64, 8) for _ in range(3))
        self.downs[2].weight = self.downs[0].weight
        self.ups[1].requires_grad_(False)
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.conv(x.view(-1, 2, 1, 3)).mean((2, 3))
        for up, down in zip(self.ups, self.downs, strict=True):
            hidden = hidden + down(torch.tanh(up(hidden)))
        return self.last(self.norm(hidden))


def net():
    return seeded(Net, torch.float64)


def options_of(mesh):
    # By default a pipeline is split by measured times, and with tied weights the split point affects bits.
    more = {"microbatches": 2, "split_at": ("ups.1",)} if mesh.pp > 1 else {}
    return {"strategy": str(mesh), "batch_size": 16, "steps": 3, "optimizer": "adamw", **more}


def look(model):
    """Properties of a model that training must not change."""
    return {
        "own": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {(n, h): len(vars(m)[h]) for n, m in model.named_modules() for h in HOOKS if vars(m).get(h)},
        "objects": [id(p) for p in model.parameters()],
        "types": [(type(p), type(p.data), p.requires_grad, p.is_leaf) for p in model.parameters()],
        "keys": list(model.state_dict()),
        "widths": [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)],
        "training": [m.training for m in model.modules()],
    }


def strides(model):
    return [(t.shape, t.stride()) for t in [*model.parameters(), *model.buffers()]]


def held(model):
    """Bytes of the parameters' memory."""
    return sum({s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}.values())


def step_by_hand(model):
    x, y = classes(16)
    before = weights(model)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not torch.equal(before["last.weight"], model.last.weight)


def train_whole(world, mesh):
    model = net()
    before, laid_out = look(model), strides(model)
    _, trained = train(world, model, classes(64), **options_of(mesh))
    assert before == look(model)
    assert laid_out == strides(model)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    step_by_hand(model)
    return trained


@pytest.mark.parametrize(("mesh", "channel"), MESHES, ids=lambda value: str(value))
def test_the_model_ends_whole_and_ordinary(run_ranks, mesh, channel):
    """The same objects and layouts, no hooks, and it can be trained by hand, on every rank."""
    first, *others = run_ranks(mesh.size, train_whole, mesh, channel=channel)
    for other in others:
        assert_same_bits(first, other)


def train_in_parts(world, mesh):
    whole, model, never = net(), net(), net()
    before, laid_out, full = look(model), strides(model), held(model)
    train(world, whole, classes(64), **options_of(mesh))
    nbdist.train(
        model, classes(64), loss="cross_entropy", gather=False, threads=1, device="cpu", verbose=False, record=False,
        **options_of(mesh),
    )  # fmt: skip
    assert before == look(model)
    bytes_here = held(model)
    with pytest.raises(TaskError, match="is sharded, because it was trained with gather=False: create it again"):
        nbdist.train(model, classes(64), loss="cross_entropy", device="cpu")

    assert nbdist.unshard(model, device="cpu") is model
    assert before == look(model)
    for again in range(2):
        if world.rank == 0:
            assert laid_out == strides(model)
            assert held(model) == full
            assert again or assert_same_bits(weights(whole), weights(model)) is None
            step_by_hand(model)
            here = weights(model)
        else:
            assert held(model) == bytes_here
        nbdist.unshard(model, device="cpu")  # twice is fine, and does not undo anything
    if world.rank == 0:
        assert_same_bits(here, weights(model))
    kept = weights(never)
    assert nbdist.unshard(never) is never
    assert_same_bits(kept, weights(never))
    return bytes_here / full


@pytest.mark.parametrize(("mesh", "channel"), SPLIT, ids=lambda value: str(value))
def test_a_model_is_left_in_parts_and_gathered(run_ranks, mesh, channel):
    """A rank holds its parts only; gathered on rank 0, the model is that of a run with gather=True."""
    fractions = run_ranks(mesh.size, train_in_parts, mesh, channel=channel)
    # Both stages hold the tied matrix, and all tp ranks the small layers that are not split; dummies have no memory.
    # Of a model as small as this one the 16 numbers before each block are a fifth.
    assert 0.98 < sum(fractions) < 1.25 if mesh == Mesh(shard=2) else 0.98 < sum(fractions) < 1.5
    assert max(fractions) < 0.9


def test_a_model_that_was_never_split(run_ranks):
    """On one rank, and with data parallelism, gather=False changes nothing."""
    expected = alone(net(), classes(64), **options_of(Mesh()))[1]
    model = net()
    assert_same_bits(expected, train(World(), model, classes(64), gather=False, **options_of(Mesh()))[1])
    assert nbdist.unshard(model) is model
    assert_same_bits(*run_ranks(2, gather_replicas))


def gather_replicas(world):
    model = net()
    train(world, model, classes(64), gather=False, **options_of(Mesh(dp=2)))
    return weights(nbdist.unshard(model, device="cpu"))


def train_and_fail(world, mesh):
    """The loss fails on the last rank, in the second step; returns the state of the model."""
    model, calls = net(), []
    before = look(model)

    def loss(output, y):
        calls.append(1)
        if len(calls) > 2 and world.rank == world.size - 1:
            raise ZeroDivisionError("in the second step")
        return F.cross_entropy(output, y)

    try:
        train(world, model, classes(64), loss=loss, **options_of(mesh))
    except (ZeroDivisionError, PeerLostError) as error:
        world.leave()
        return type(error), {k: v for k, v in look(model).items() if before[k] != v}


@pytest.mark.parametrize(("mesh", "channel"), SPLIT, ids=lambda value: str(value))
def test_after_a_failure_nothing_of_us_is_left_in_the_module(run_ranks, mesh, channel):
    """It lacks other ranks' parts, but no hooks or patched forwards are left."""
    outcomes = run_ranks(mesh.size, train_and_fail, mesh, channel=channel)
    assert outcomes[-1][0] is ZeroDivisionError
    assert {PeerLostError} == {kind for kind, _ in outcomes[:-1]}
    assert all(changed == {} for _, changed in outcomes)


def fail_to_begin(world, mesh, options):
    model = net()
    before = look(model)
    with contextlib.suppress(NbdistError):
        train(world, model, classes(64), **options_of(mesh) | options)
        pytest.fail("it began")
    return {k: v for k, v in look(model).items() if before[k] != v}


@pytest.mark.parametrize(
    ("mesh", "options"),
    [(Mesh(pp=2, tp=2), {"split_at": ("nowhere",)}), (Mesh(shard=2, pp=2), {"split_at": ("nowhere",)})],
    ids=["tensor", "shard"],
)
def test_after_a_wrong_beginning_nothing_of_us_is_left(run_ranks, mesh, options):
    """Layers that were already split are restored."""
    assert all(changed == {} for changed in run_ranks(mesh.size, fail_to_begin, mesh, options))
