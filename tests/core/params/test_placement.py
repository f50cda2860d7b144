"""Placements: tensors split, sharded, on some stages, and gathered to the same bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import assert_same_bits
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.state import cut_state_, gather_state_
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placeholder import dummy
from nbdist.core.params.placement import Cut, Placement, shard_of
from nbdist.plan import Mesh

SHAPES = [(8, 6), (4, 3, 5), (6,), (2, 0), (0, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def numbers(shape, dtype=torch.float64):
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1).reshape(shape).to(dtype)


@pytest.mark.parametrize("sections", [(6,), (2, 4), (2, 2, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_join(sections, dim):
    """Each section is split separately, so that a rank holds a part of each."""
    whole, cut = numbers((6, 6)), Cut(dim=dim, sections=sections)
    parts = [cut.part(whole, rank, 2) for rank in range(2)]
    assert all(part.is_contiguous() for part in parts)
    assert all(part.untyped_storage().nbytes() == whole.nbytes / 2 for part in parts)
    assert torch.equal(whole, cut.join(parts))
    first = whole.narrow(dim, 0, sections[0]).chunk(2, dim)
    for part, expected in zip(parts, first, strict=True):
        assert torch.equal(expected, part.narrow(dim, 0, sections[0] // 2))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 3), (0,), (2, 0)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_are_of_equal_length_and_padded(shape, size):
    """Concatenated and cut to its length, the shards are the whole tensor."""
    whole = numbers(shape)
    parts = [shard_of(whole, rank, size) for rank in range(size)]
    assert {part.shape for part in parts} == {(-(-whole.numel() // size),)}
    assert torch.equal(whole, torch.cat(parts)[: whole.numel()].view(shape))


def test_shards_have_memory_of_their_own():
    """Also if one rank holds the whole tensor."""
    whole = numbers((4,))
    shard_of(whole, 0, 1).zero_()
    Placement(layout=whole.to("meta")).part(whole, MeshChannels(_solo(), Mesh())).zero_()
    assert torch.equal(numbers((4,)), whole)


def _solo():
    from nbdist.core.comm.world import World

    return World()


def placements(shape, mesh, layout):
    """Every possible placement of a tensor of this shape on a mesh."""
    cuts = [None]
    if mesh.tp > 1:
        cuts += [Cut(dim=d, sections=(n,)) for d, n in enumerate(shape) if n % mesh.tp == 0]
        cuts += [Cut(dim=d, sections=(n // 4, n - n // 4)) for d, n in enumerate(shape) if n == 8]
    stages = [None]
    if mesh.pp > 1:
        stages += [own for n in range(1, mesh.pp + 1) for own in itertools.combinations(range(mesh.pp), n)]
    shards = [False, True] if mesh.shard > 1 else [False]
    for cut, stage, sharded in itertools.product(cuts, stages, shards):
        yield Placement(layout=layout, stages=stage, cut=cut, sharded=sharded)


def part_and_gather(world, mesh):
    """The number of placements from which every tensor is gathered, on this rank."""
    axes, counted = MeshChannels(world, mesh), 0
    wholes = [numbers(shape, dtype) for shape in SHAPES for dtype in (DTYPES if shape == SHAPES[0] else DTYPES[:1])]
    wholes += [
        numbers((), torch.float32),
        numbers((8, 6)).T,
        numbers((4, 2, 3, 3)).to(memory_format=torch.channels_last),
    ]
    for whole in wholes:
        for placement in placements(whole.shape, mesh, torch.empty_like(whole, device="meta")):
            held = placement.held(axes)
            part = placement.part(whole, axes) if held else None
            if part is not None:
                part_of = whole.numel() // (mesh.tp if placement.cut else 1)
                shards = mesh.shard if placement.sharded else 1
                assert part.numel() == -(-part_of // shards)
            gathered = placement.gather(part, axes)
            assert gathered.dtype == whole.dtype
            assert torch.equal(whole, gathered), placement
            result = placement.with_layout(gathered)
            assert result.stride() == torch.empty_like(whole).stride()
            assert torch.equal(whole, result)
            owned = torch.tensor([0.0 if part is None else 1.0 / placement.copies(axes)])
            axes.replica.all_reduce_(owned)
            parts = (mesh.tp if placement.cut else 1) * (mesh.shard if placement.sharded else 1)
            assert owned.item() == pytest.approx(parts)
            counted += 1
    axes.close()
    return counted


@pytest.mark.parametrize(
    ("mesh", "channel"),
    [
        (Mesh(), "shared memory"),
        (Mesh(shard=2), "shared memory"),
        (Mesh(shard=3), "process group"),
        (Mesh(pp=3), "shared memory"),
        (Mesh(pp=2, tp=2), "two hosts"),
        (Mesh(shard=2, tp=2), "process group"),
        (Mesh(dp=2, pp=2), "shared memory"),
    ],
    ids=str,
)
def test_parts_make_the_whole(run_ranks, mesh, channel):
    """Every placement on every mesh, for odd shapes, scalars, empty tensors, other layouts and dtypes."""
    counts = run_ranks(mesh.size, part_and_gather, mesh, channel=channel)
    assert len(set(counts)) == 1
    assert counts[0] >= 13


class Tied(nn.Module):
    """Tied weights, a scalar, channels-last weights, and integers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.conv = nn.Conv2d(2, 4, 3)
        self.conv.to(memory_format=torch.channels_last)
        self.count = nn.Parameter(torch.arange(5), requires_grad=False)
        self.register_buffer("mean", torch.arange(3.0))


def table_there_and_back(world, mesh):
    """Split a model and its optimizer's state, and gather both; returns them before and after."""
    torch.manual_seed(0)
    model, axes = Tied(), MeshChannels(world, mesh)
    optimizer = torch.optim.NAdam([p for p in model.parameters() if p.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    states = {
        n: {k: v.clone() for k, v in optimizer.state[p].items()}
        for n, p in model.named_parameters()
        if p in optimizer.state
    }
    strides = {n: t.stride() for n, t in before.items()}
    objects = list(model.parameters())
    table = ParamTable.of(model)
    for i, (name, tensor) in enumerate(table.tensors.items()):
        cut = Cut(dim=0, sections=(4,)) if mesh.tp > 1 and tensor.shape[:1] == (4,) else None
        stages = ((0, 1), (1,), (0,))[i % 3] if mesh.pp > 1 else None
        sharded = mesh.shard > 1 and name in table.parameters
        placement = Placement(layout=torch.empty_like(tensor, device="meta"), stages=stages, cut=cut, sharded=sharded)
        table.placements[name] = placement
    cut_state_(optimizer, table, axes)
    for name, placement in table.placements.items():
        held = placement.held(axes)
        if name in table.buffers and not held:
            table.buffers[name].fill_(-1)
        elif name in table.parameters:
            parameter = table.parameters[name]
            whole = parameter.detach().clone()
            parameter.data = placement.part(whole, axes) if held else dummy(whole, whole.device)
    gather_state_(optimizer, table, axes, keep=True)
    table.gather_(axes)
    axes.close()
    assert_same_bits(before, model.state_dict())
    assert strides == {n: t.stride() for n, t in model.state_dict().items()}
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert model.b.weight is model.a.weight
    assert not model.count.requires_grad
    for name, state in states.items():
        after = optimizer.state[table.parameters[name]]
        assert_same_bits(state, dict(after))
        assert {k: v.stride() for k, v in state.items()} == {k: v.stride() for k, v in after.items()}
    optimizer.step()
    return True


@pytest.mark.parametrize("mesh", [Mesh(shard=2), Mesh(pp=2), Mesh(tp=2), Mesh(shard=2, pp=2)], ids=str)
def test_a_model_and_its_optimizer_come_home(run_ranks, mesh):
    """Ties, scalars, integers, channels-last strides and the optimizer's state are unchanged."""
    assert all(run_ranks(mesh.size, table_there_and_back, mesh))
