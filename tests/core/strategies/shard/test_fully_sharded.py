"""Fully sharded parameters: however a model or a step reads them, the numbers are those of one process."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import assert_same_bits, classes, seeded, stop_after, train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nbdist.core.comm.world import World
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.strategies.shard import block as shard_block
from nbdist.core.strategies.shard.fully_sharded import FullySharded
from nbdist.errors import PlanError

WIDTH = 6


def layer():
    return nn.Linear(WIDTH, WIDTH)


class Net(nn.Module):
    """Layers, each of which is gathered by itself, and a parameter of the model's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(8))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.extra()

    def extra(self):
        pass

    def body(self, x):
        for one in self.layers:
            x = x + torch.tanh(one(x))
        return x

    def forward(self, x):
        return self.body(x) * self.scale


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = layer()

    def forward(self, x, gate=None):
        return self.mix(x) * torch.tanh(gate)


class GivenAway(Net):
    """Passes its parameter to a child, which alone computes with it."""

    def extra(self):
        self.gate = Gated()

    def forward(self, x):
        return self.gate(self.body(x), self.scale)


class GivenToAChild(Net):
    """Passes a parameter positionally and by name; unchanged, as a view, and as a result of computing with it."""

    def extra(self):
        self.gates = nn.ModuleList(Gated() for _ in range(4))

    def forward(self, x):
        x = self.gates[0](self.body(x), self.scale)
        x = self.gates[1](x, gate=self.scale)
        x = self.gates[2](x, self.scale.view(1, -1))
        return self.gates[3](x, gate=self.scale * 2)


class Holder(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.weight, self.give = nn.Parameter(torch.randn(WIDTH, WIDTH)), give
        self.kept = None

    def forward(self):
        self.kept = self.weight.t()
        return {
            "itself": self.weight, "view": self.weight.t(), "views": [self.weight[:3], self.weight[3:]],
            "object": SimpleNamespace(weight=self.weight.t()), "nothing": torch.zeros(()),
        }[self.give]  # fmt: skip


class Returned(Net):
    """A child returns its parameter, a view of it, views in a list, a view in an object, or keeps one."""

    def extra(self):
        self.holders = nn.ModuleDict({give: Holder(give) for give in ("itself", "view", "views", "object", "nothing")})

    def forward(self, x):
        x = self.body(x)
        given = {give: holder() for give, holder in self.holders.items()}
        x = torch.tanh(x @ given["itself"]) @ given["view"]
        x = torch.tanh(x @ torch.cat(given["views"])) @ given["object"].weight
        return x @ self.holders["nothing"].kept * self.scale


class OfOthers(Net):
    """Weights of modules that are never called, and of modules that are called elsewhere."""

    def extra(self):
        self.other, self.table = layer(), nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(WIDTH))})

    def forward(self, x):
        x = F.linear(x, self.other.weight, self.layers[0].bias)
        x = self.body(x) + F.linear(x, self.layers[3].weight)
        return x * sum(self.table) * self.named["a"]


class Tied(Net):
    """One weight in several layers, of which one is called twice."""

    def extra(self):
        self.layers[5].weight = self.layers[1].weight
        self.layers[6] = self.layers[2]
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.layers[4].weight

    def forward(self, x):
        return self.head(self.layers[0](self.body(x)))


class Checkpointed(Net):
    """Checkpoints layers, several at a time, and functions that read weights, nested."""

    reentrant = False

    def again(self, function, *args):
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def several(self, x):
        return self.again(self.layers[3], torch.tanh(self.layers[2](x))) * self.layers[7].bias

    def forward(self, x):
        x = self.layers[0](x)
        x = self.again(self.layers[1], x)
        x = self.again(self.several, x)
        x = self.again(lambda x: torch.tanh(x * self.scale), x)
        x = self.again(lambda x: F.linear(x, self.layers[4].weight), x)
        return self.again(self.body, x)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Functional(Net):
    """A child called with other weights than its own, some of them made of parameters."""

    def extra(self):
        self.inner = layer()

    def forward(self, x):
        weights = {"weight": self.inner.weight * 2, "bias": self.layers[0].bias}
        return torch.func.functional_call(self.inner, weights, (self.body(x),))


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


class OwnBackward(Net):
    """A function with a backward of its own, with the weight of another layer."""

    def forward(self, x):
        return Own.apply(self.body(x), self.layers[2].weight) * self.scale


class Adapted(Net):
    """Takes a gradient step in its forward."""

    def forward(self, x):
        inner = self.layers[0]
        weight, bias = torch.autograd.grad(inner(x).square().mean(), [inner.weight, inner.bias], create_graph=True)
        adapted = {"weight": inner.weight - 0.5 * weight, "bias": inner.bias - 0.5 * bias}
        return super().forward(torch.func.functional_call(inner, adapted, (x,)))


class ReadsItsData(Net):
    """Reads ``data`` and writes nothing there."""

    def forward(self, x):
        weight = self.layers[0].weight
        return super().forward(x @ (weight + (weight.data.sign() - weight.data)))


class Fickle(Net):
    """Reads another module's weight only after some weight has changed, which no example call shows."""

    def extra(self):
        self.register_buffer("first", self.scale.detach().clone())

    def forward(self, x):
        x = self.body(x) * self.scale
        return x if torch.equal(self.first, self.scale) else x @ self.layers[1].weight


class OfTorch(Net):
    """Torch's own modules that read weights without calling the modules that hold them."""

    def extra(self):
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.memory = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(layer())
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True)

    def forward(self, x):
        x = self.body(x).view(-1, 2, WIDTH)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.normed(self.encoder(self.memory(x)[0])).view(-1, WIDTH) * self.scale


MODELS = {
    kind.__name__: kind
    for kind in (
        Net, GivenAway, GivenToAChild, Returned, OfOthers, Tied, Checkpointed, CheckpointedReentrant, Functional,
        OwnBackward, Fickle, OfTorch, Adapted, ReadsItsData,
    )
}  # fmt: skip


def error(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def squares(model):
    return sum(p.square().sum() for p in model.parameters())


def penalty_before(model, batch):
    penalty = 1e-2 * squares(model)
    return penalty + error(model, batch)


def penalty_that_saves_nothing(model, batch):
    penalty = 1e-2 * sum(p.sum() for p in model.parameters())
    return penalty + error(model, batch)


def penalty_of_two(model, batch):
    pair = model.layers[0].weight.flatten() @ model.layers[7].weight.flatten()
    return error(model, batch) + 1e-2 * (pair + nn.utils.parameters_to_vector(model.parameters()).norm())


def penalty_on_gradients(model, batch):
    x = batch[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return error(model, batch) + 1e-2 * gradient.square().mean()


def two_calls(model, batch):
    return error(model, batch) + error(model, (batch[0] + 1, batch[1]))


def what_it_reads(model, batch):
    with torch.no_grad():
        values = {name: value.clone() for name, value in model.state_dict().items()}
        factor = 1 + 0.1 * model.scale.mean() + 0.1 * values["layers.3.weight"].std()
    return error(model, batch) * float(factor)


STEPS = {
    step.__name__: step
    for step in (
        penalty_before, penalty_that_saves_nothing, penalty_of_two, penalty_on_gradients, two_calls, what_it_reads,
    )
}  # fmt: skip


def trained(world, model, step, options):
    made = seeded({**MODELS, **WRITING}[model], torch.float64)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = torch.optim.SGD(made.parameters(), 0.05, momentum=0.9)
    result, weights = train(
        world,
        made,
        (x, x.flip(1)),
        step=step,
        optimizer=optimizer,
        batch_size=8,
        epochs=2,
        shuffle=False,
        check="mesh" if model in ("Adapted", "Renormed") else "yes",
        **options,
    )
    return result.history[-1]["loss"], weights


def both(run_ranks, model, step):
    """On two ranks the losses and weights of one process that runs the same slices."""
    expected = trained(World(), model, step, {"accumulate": 2})
    for actual in run_ranks(2, trained, model, step, {"strategy": "shard"}):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_however_a_model_reads_its_parameters(run_ranks, model):
    """Passed on, returned, read outside their module, tied, computed twice: each trains as in one process."""
    both(run_ranks, model, error)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_reads_parameters(run_ranks, step):
    """The step reads it before, after or without the model's forward, with gradient and without."""
    both(run_ranks, "Net", STEPS[step])


def writes_in_the_step(model, batch):
    with torch.no_grad():
        model.scale.mul_(0.5)
    return error(model, batch)


def takes_data(model, batch):
    model.scale.data.mul_(0.5)
    return error(model, batch)


class WritesInForward(Net):
    def forward(self, x):
        with torch.no_grad():
            self.layers[2].weight.clamp_(-1, 1)
        return super().forward(x)


class ReplacesInForward(Net):
    def forward(self, x):
        self.layers[2].weight.data = self.layers[2].weight.data / 2
        return super().forward(x)


class WritesPastAutograd(Net):
    def forward(self, x):
        self.layers[2].weight.data.mul_(0.5)
        return super().forward(x)


class Renormed(Net):
    def extra(self):
        self.table = nn.Embedding(4, WIDTH, max_norm=0.1)

    def forward(self, x):
        return self.body(x) * self.table(torch.arange(len(x)) % 4)


class KeptInBounds(Net):
    """Clamps a weight to bounds that it reaches in training, and not at the start."""

    def extra(self):
        nn.init.uniform_(self.layers[2].weight, -0.09, 0.09)

    def forward(self, x):
        self.layers[2].weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class KeptInBoundsByTheLayer(KeptInBounds):
    """The layer itself clamps, from the third call on."""

    def extra(self):
        super().extra()
        calls = []

        def clamp(module, args):
            calls.append(None)
            if len(calls) > 2:
                module.weight.data.clamp_(-0.1, 0.1)

        self.layers[2].register_forward_pre_hook(clamp)

    def forward(self, x):
        return Net.forward(self, x)


WRITING = {
    kind.__name__: kind
    for kind in (
        WritesInForward, ReplacesInForward, WritesPastAutograd, Renormed, KeptInBounds, KeptInBoundsByTheLayer,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "step", "parameter"),
    [
        ("Net", writes_in_the_step, "scale"),
        ("Net", takes_data, "scale"),
        ("WritesInForward", error, "layers.2.weight"),
        ("ReplacesInForward", error, "layers.2.weight"),
        ("WritesPastAutograd", error, "layers.2.weight"),
        ("Renormed", error, "table.weight"),
        ("KeptInBounds", error, "layers.2.weight"),
        ("KeptInBoundsByTheLayer", error, "layers.2.weight"),
    ],
)
def test_writing_to_gathered_parameters_is_refused(run_ranks, model, step, parameter):
    """The write would be lost: each rank holds a shard only."""
    with pytest.raises(PlanError, match=f"writes to parameter {parameter}.* use the strategy data"):
        run_ranks(2, trained, model, step, {"strategy": "shard"})


def most_memory(world):
    """The largest number of gathered elements of one rank, after the forward and in the backward."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    alive: list[Any] = []
    gather = shard_block.Block.gather
    most = [0]

    def counted(block):
        gather(block)
        alive.extend(map(weakref.ref, block._gathered_data))
        most[0] = max(most[0], sum(whole.numel() for ref in alive if (whole := ref()) is not None))

    shard_block.Block.gather = counted
    x = torch.randn(8, 64)
    train(world, model, (x, x), step=error, optimizer="sgd", batch_size=8, steps=2, strategy="shard")
    return most[0]


def test_at_most_two_blocks_are_gathered_at_a_time(run_ranks):
    """Autograd saves references, and backward gathers again."""
    for most in run_ranks(2, most_memory, channel="process group"):
        assert 64 * 64 <= most <= 2 * 64 * 64


def mapped_at(addresses):
    """The inode of each file that is mapped at addresses, and how many KiB of it are pages of this process alone."""
    found, inode = set(), None
    for first, *words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if "-" in first:  # a mapping; lines about it follow
            start, stop = (int(end, 16) for end in first.split("-"))
            inode = int(words[3]) if any(start <= address < stop for address in addresses) else None
        elif inode is not None and first == "Anonymous:":
            found.add((inode, int(words[0])))
    return found


def memory(world):
    """How many places each block was gathered in, and what is mapped in these before the last step."""
    model, places, calls = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), {}, []
    gather, mapped = shard_block.Block.gather, set()

    def noted(block):
        gather(block)
        places.setdefault(block, set()).add(tuple(whole.data_ptr() for whole in block._gathered_data))

    def step(model, batch):
        calls.append(1)
        if len(calls) == 5:
            mapped.update(mapped_at([address for found in places.values() for place in found for address in place]))
        return error(model, batch)

    x = torch.randn(8, 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_block.Block, "gather", noted)
        train(world, model, (x, x), step=step, optimizer="adamw", batch_size=8, steps=5, strategy="shard")
    return {len(found) for found in places.values()}, mapped


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is mapped")
def test_on_one_host_a_gather_takes_no_memory(run_ranks):
    """A block is whole in a file that all ranks map, in one place, and none of its pages is a rank's own."""
    (places, mapped), other = run_ranks(2, memory)
    files, own_kib = ({pair[i] for pair in mapped} for i in range(2))
    assert ({1}, 1, {0}) == (places, len(files - {0}), own_kib)  # memory without a file has 0 as its inode
    assert other == (places, mapped)


class WritesPastTorch(Net):
    """Writes to a weight as an array, which neither torch nor a watch sees, from the third step on."""

    def extra(self):
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > 3 and torch.is_grad_enabled():
            self.layers[2].register_forward_pre_hook(write_as_array)
        return super().forward(x)


def write_as_array(layer, _args):
    layer.weight.detach().numpy().__imul__(0.5)


def written_past_torch(world, paths):
    model = seeded(WritesPastTorch, torch.float64)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"optimizer": "sgd", "batch_size": 8, "steps": 6, "shuffle": False, "strategy": "shard"}
    try:
        train(world, model, (x, x.flip(1)), step=error, snapshot_paths=paths, **options)
    except PlanError as refused:
        return str(refused)


def stopped_before(world, paths, step):
    model = seeded(Net, torch.float64)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"optimizer": "sgd", "batch_size": 8, "steps": 6, "shuffle": False, "strategy": "shard"}
    train(world, model, (x, x.flip(1)), step=error, snapshot_paths=paths, commands=stop_after(step), **options)


def test_a_write_that_torch_does_not_see_is_refused_and_the_snapshot_unharmed(run_ranks):
    """The system knows which private pages were written; the common weights, which are saved, have not changed."""
    stores = SnapshotStore(2), SnapshotStore(2)
    for message in run_ranks(2, written_past_torch, stores[0].paths):
        assert "writes to parameter layers.2.weight" in message
    saved = CheckpointReader.of_snapshot(stores[0].paths)
    assert 3 == saved.step
    run_ranks(2, stopped_before, stores[1].paths, 3)
    expected = CheckpointReader.of_snapshot(stores[1].paths)
    for name in expected.names:
        assert torch.equal(expected.whole(name), saved.whole(name)), name
    for store in stores:
        store.close()


def same_values_written(world):
    """Train a model whose layer writes the values that its weight has anyway, once; on pages of its own."""
    made = seeded(Net, torch.float64)
    calls = []

    def rewrite(layer, _args):
        calls.append(None)
        if len(calls) == 1:
            layer.weight.detach().numpy().__imul__(1.0)

    made.layers[2].register_forward_pre_hook(rewrite)
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return train(
        world, made, (x, x.flip(1)), step=error, optimizer="sgd", lr=0.05, batch_size=8, steps=6, shuffle=False,
        **({"strategy": "shard"} if world.size > 1 else {"accumulate": 2}),
    )[1]  # fmt: skip


def test_pages_that_were_written_show_later_updates(run_ranks):
    """A private page keeps its values for good, so it is given up, also if the write changed none of them."""
    expected = same_values_written(World())
    for actual in run_ranks(2, same_values_written):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def bits(world, make, mesh):
    data = classes(16, torch.float32)
    return train(
        world, seeded(make), data, optimizer="adamw", batch_size=8, epochs=2, shuffle=False, strategy=mesh
    )[1]  # fmt: skip


class Mixed(nn.Module):
    """Two dtypes, a frozen, an unused and an empty parameter, and lengths that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 3).double()
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))
        self.empty = nn.Parameter(torch.randn(0, 3))

    def forward(self, x):
        return self.second((torch.tanh(self.first(x)) * self.frozen).double()) + self.empty.sum()


@pytest.mark.parametrize(("size", "mesh"), [(2, "shard=2"), (3, "shard=3"), (4, "shard=4"), (4, "dp=2,shard=2")])
def test_blocks_that_are_mapped_give_the_bits_of_blocks_that_are_sent(run_ranks, size, mesh):
    """Shared memory or messages: the same shards, added in rank order."""
    expected, *_ = run_ranks(size, bits, Mixed, mesh, channel="process group")
    for actual in run_ranks(size, bits, Mixed, mesh):
        assert_same_bits(expected, actual)


def chosen(world, limit):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if world.rank == 1 and limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        parameters = list(seeded(Net).parameters())
        names = {parameter: str(i) for i, parameter in enumerate(parameters)}
        shards = FullySharded([parameters], world.channel(), names, lambda _parameters: None)
        kind = type(shards._whole).__name__
        shards.close()
        return kind
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize(("limit", "kind"), [(0, "MappedBlocks"), (2**40, "GatheredBlocks")])
def test_blocks_are_not_mapped_where_the_memory_of_a_rank_is_limited(run_ranks, limit, kind):
    """A limit would count the whole model on each rank; all ranks choose alike, though one is limited."""
    assert run_ranks(2, chosen, limit) == [kind] * 2
