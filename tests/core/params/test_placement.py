"""Where the parts of a tensor lie: cut, dealt out, on some stages, and whole again to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import assert_same_bits
from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.optim.state import cut_state_, gather_state_
from nbdist.core.params.placeholder import dummy
from nbdist.core.params.placement import Cut, Placement, shard_of
from nbdist.core.params.table import ParamTable
from nbdist.plan import Mesh

SHAPES = [(8, 6), (4, 3, 5), (6,), (2, 0), (0, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def numbers(shape, dtype=torch.float64):
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1).reshape(shape).to(dtype)


@pytest.mark.parametrize("sections", [(6,), (2, 4), (2, 2, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_join(sections, dim):
    """Each section is split by itself, so that a rank holds a part of each."""
    whole, cut = numbers((6, 6)), Cut(dim=dim, sections=sections)
    pieces = [cut.piece(whole, rank, 2) for rank in range(2)]
    assert all(piece.is_contiguous() for piece in pieces)
    assert all(piece.untyped_storage().nbytes() == whole.nbytes / 2 for piece in pieces)
    assert torch.equal(whole, cut.join(pieces))
    first = whole.narrow(dim, 0, sections[0]).chunk(2, dim)
    for piece, expected in zip(pieces, first, strict=True):
        assert torch.equal(expected, piece.narrow(dim, 0, sections[0] // 2))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 3), (0,), (2, 0)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_are_of_equal_length_and_padded(shape, size):
    """The whole is what they hold one after the other, cut to its length."""
    whole = numbers(shape)
    parts = [shard_of(whole, rank, size) for rank in range(size)]
    assert {part.shape for part in parts} == {(-(-whole.numel() // size),)}
    assert torch.equal(whole, torch.cat(parts)[: whole.numel()].view(shape))


def test_shards_have_memory_of_their_own():
    """Also where one rank holds all."""
    whole = numbers((4,))
    shard_of(whole, 0, 1).zero_()
    Placement(layout=whole.to("meta")).piece(whole, MeshChannels(_solo(), Mesh())).zero_()
    assert torch.equal(numbers((4,)), whole)


def _solo():
    from nbdist.core.comm.world import World

    return World()


def placements(shape, mesh, layout):
    """Every placement that a tensor of a shape may have on a mesh."""
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
    """How many placements bring every tensor back, on this rank."""
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
            part = placement.piece(whole, axes) if held else None
            if part is not None:
                part_of = whole.numel() // (mesh.tp if placement.cut else 1)
                shards = mesh.shard if placement.sharded else 1
                assert part.numel() == -(-part_of // shards)
            gathered = placement.gather(part, axes)
            assert gathered.dtype == whole.dtype
            assert torch.equal(whole, gathered), placement
            home = placement.laid_out(gathered)
            assert home.stride() == torch.empty_like(whole).stride()
            assert torch.equal(whole, home)
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
    """Every placement on every mesh, for odd shapes, scalars, nothing at all, other layouts and dtypes."""
    counts = run_ranks(mesh.size, part_and_gather, mesh, channel=channel)
    assert len(set(counts)) == 1
    assert counts[0] >= 13


class Tied(nn.Module):
    """Two names for one matrix, a scalar, images' weights, and numbers that are not trained."""

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
    """Cut a model and its optimizer's state, gather both; what they were and are."""
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
            parameter.data = placement.piece(whole, axes) if held else dummy(whole, whole.device)
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
    """Ties, scalars, integers, channels-last strides and the optimizer's state are what they were."""
    assert all(run_ranks(mesh.size, table_there_and_back, mesh))
