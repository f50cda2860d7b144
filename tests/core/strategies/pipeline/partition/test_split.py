"""Splitting any module into pipeline stages: the same bits, the same gradients, the user's own parameters."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from problems import assert_same_bits, seeded
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from nbdist.core.strategies.pipeline.partition import Call, Split, profiling, split
from nbdist.errors import PlanError, TaskError


class Residual(nn.Module):
    def __init__(self, width, stride=1):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else None

    def forward(self, x):
        rest = x if self.down is None else self.down(x)
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + rest)


class ResNet(nn.Module):
    """Sizes that are read in the first stage are used in the last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(Residual(8), Residual(8, 2), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        samples = x.shape[0]
        return self.head(self.layers(self.stem(x)).mean((2, 3)).view(samples, -1))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, mask):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm(x)).split(d, -1))
        scores = (q @ k.transpose(-2, -1)).masked_fill(mask[:t, :t] == 0, float("-inf"))
        x = x + F.dropout(self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d)), 0.1, self.training)
        return x + self.mlp(x)


class GPT(nn.Module):
    """An assertion, positions, a tied head and a mask that all blocks share."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(30, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(4))
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.tril(torch.ones(12, 12)))

    def forward(self, ids):
        length = ids.shape[1]
        assert length <= 12
        x = self.wte(ids) + self.wpe(torch.arange(length, device=ids.device))
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(x)


class UNet(nn.Module):
    """Values skip over several stages."""

    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.d3 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.u2, self.u1, self.out = nn.Conv2d(32, 16, 3, 1, 1), nn.Conv2d(32, 8, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1)

    def forward(self, x):
        a = F.relu(self.d1(x))
        b = F.relu(self.d2(a))
        c = F.relu(self.u2(F.interpolate(F.relu(self.d3(b)), scale_factor=2.0)))
        d = F.relu(self.u1(F.interpolate(torch.cat([c, b], 1), scale_factor=2.0)))
        return self.out(torch.cat([d, a], 1))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), relu, nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), relu)
        self.conv, self.relu, self.last = nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.body(x)
        y = self.conv(x)
        y += x
        return self.last(self.relu(y))


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(30, 8), nn.LSTM(8, 16, 2, batch_first=True)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 30)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.lstm(self.embedding(ids))[0])))


class Dictionary(nn.Module):
    """Nested arguments and output, integers, constants, labels that may be missing."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, pair, *, labels=None, scale=2.0):
        x, mask = pair
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))) * mask.unsqueeze(-1) * scale)
        loss = None if labels is None else F.cross_entropy(y, labels)
        return {"logits": y, "loss": loss, "n": 3, "more": [(y.argmax(-1), None)]}


class Branch(nn.Module):
    """Its forward branches on values."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > 0:
            x = self.b(x)
        return x * x.abs().max().item()


class Twice(nn.Module):
    """One BatchNorm, called twice: both calls write its buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.c(torch.relu(self.norm(self.b(self.norm(self.a(x))))))


class Frozen(nn.Module):
    """What torch.fx would silently trace wrong: a part under no_grad, and Python's random numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.c(torch.relu(self.b(x) + torch.randn(8, dtype=x.dtype)))


def mlp():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.2)) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def branches():
    return nn.Sequential(nn.Linear(8, 8), Branch(), nn.ReLU(), Branch(), nn.Linear(8, 8), nn.Linear(8, 8))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), 3)


def vectors(*shape):
    return torch.randn(4, *shape, dtype=torch.float64)


def tokens():
    return torch.randint(30, (4, 10))


PAIR = lambda: ((vectors(8), torch.rand(4) > 0.3),)  # noqa: E731
MODELS = {
    "mlp": (mlp, lambda: (vectors(8),), dict),
    "resnet": (ResNet, lambda: (vectors(3, 8, 8),), dict),
    "gpt": (GPT, lambda: (tokens(),), dict),
    "unet": (UNet, lambda: (vectors(3, 8, 8),), dict),
    "in place": (InPlace, lambda: (vectors(3, 8, 8),), dict),
    "lstm": (LSTM, lambda: (tokens(),), dict),
    "encoder": (encoder, lambda: (vectors(5, 16),), dict),
    "dictionary": (Dictionary, PAIR, dict),
    "labels": (Dictionary, PAIR, lambda: {"labels": torch.randint(4, (4,)), "scale": 0.5}),
    "branches": (branches, lambda: (vectors(8),), dict),
    "twice": (Twice, lambda: (vectors(8),), dict),
    "frozen": (Frozen, lambda: (vectors(8),), dict),
}


def example(name):
    make, args, kwargs = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return seeded(make, torch.float64), args(), kwargs()


def resized(value, samples):
    return pytree.tree_map(lambda v: torch.cat([v, v])[:samples] if isinstance(v, torch.Tensor) else v, value)


def run(parts: Split, args, kwargs):
    call, values = Call.of(args, kwargs)
    for i in range(len(parts.infos)):
        values = parts.stage(i, call)(*values)
    return values


def result(forward, model):
    """Output, gradients and buffers of a forward and backward under fixed random numbers."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        output = forward()
        leaves = [v for v in pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]
        if model.training:
            sum(v.square().mean() for v in leaves if v.requires_grad).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, dict(enumerate(leaves)), gradients, {n: b.clone() for n, b in model.named_buffers()}


def assert_same_result(parts, model, args, kwargs):
    other = copy.deepcopy(model)
    kept = copy.deepcopy(model.state_dict())
    expected, actual = result(lambda: other(*args, **kwargs), other), result(lambda: run(parts, args, kwargs), model)
    assert pytree.tree_structure(expected[0]) == pytree.tree_structure(actual[0])
    for first, second in zip(expected[1:], actual[1:], strict=True):
        assert_same_bits(first, second)
    model.load_state_dict(kept)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_in_sequence_equal_the_model(name, stages):
    """Bit for bit: outputs and their structure, gradients, buffers; in train and eval mode; for any batch size."""
    model, args, kwargs = example(name)
    parts = split(model, args, kwargs, stages)
    for training in (True, False):
        model.train(training)
        for samples in (4, 3, 5) if stages == 2 else (4, 1):
            if samples > 1 or not (
                training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
            ):
                assert_same_result(parts, model, resized(args, samples), resized(kwargs, samples))


@pytest.mark.parametrize("name", ["gpt", "in place", "branches", "twice"])
def test_stages_hold_the_users_own_tensors(name):
    """The same parameter objects, each listed with all stages that use it; none is missing."""
    model, args, kwargs = example(name)
    parts = split(model, args, kwargs, 3)
    call, _ = Call.of(args, kwargs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(tensors) == set(parts.holders)
    stages = [parts.stage(i, call) for i in range(3)]
    inside = [{id(t) for t in (*stage.parameters(), *stage.buffers())} for stage in stages]
    for holder, tensor in tensors.items():
        assert parts.holders[holder] == tuple(i for i in range(3) if id(tensor) in inside[i])
    assert sum(len(set(stage.parameters())) for stage in stages) >= len(set(model.parameters()))
    assert {id(p) for s in stages for p in s.parameters()} == {id(p) for p in model.parameters()}
    if name == "gpt":
        assert parts.holders["wte.weight"] == (0, 2)
    if name == "twice":
        assert len(parts.holders["norm.running_mean"]) == 1


@pytest.mark.parametrize("name", ["resnet", "gpt"])
def test_splitting_leaves_the_model_unchanged(name):
    """Weights, buffers, modes, gradients, hooks, attributes and every random state."""
    model, args, kwargs = example(name)
    next(model.children()).eval()
    before = copy.deepcopy(model.state_dict())
    attributes = [{k: (v, copy.copy(v)) for k, v in vars(m).items()} for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        parts = split(model, args, kwargs, 2)
        parts.stage(0, Call.of(resized(args, 1), kwargs)[0])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert_same_bits(before, model.state_dict())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for module, saved in zip(model.modules(), attributes, strict=True):
        assert set(vars(module)) == set(saved)
        assert all(vars(module)[k] is v for k, (v, _) in saved.items())
        assert module._parameters == saved["_parameters"][1]
        assert module.training == saved["training"][1]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", ["in place", "unet", "gpt", "labels", "frozen", "encoder"])
def test_gradients_go_back_from_stage_to_stage(name, stages):
    """As between ranks: a stage's inputs are leaves, whose gradients are sent back."""
    model, args, kwargs = example(name)
    parts = split(model, args, kwargs, stages)
    expected = result(lambda: model(*args, **kwargs), model)[2]
    call, values = Call.of(args, kwargs)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    received, sent = [], []
    for i in range(stages):
        received.append([v.detach().requires_grad_(v.requires_grad) for v in values])
        output = parts.stage(i, call)(*received[-1])
        values = output if i < stages - 1 else pytree.tree_leaves(output)
        sent.append(values)
    last = [v for v in sent[-1] if isinstance(v, torch.Tensor) and v.requires_grad]
    sum(v.square().mean() for v in last).backward()
    for i in reversed(range(stages - 1)):
        pairs = [(v, r.grad) for v, r in zip(sent[i], received[i + 1], strict=True) if r.grad is not None]
        torch.autograd.backward([v for v, _ in pairs], [grad for _, grad in pairs])
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_modes_of_submodules_are_kept():
    """A submodule that the user put into eval mode stays in it."""
    model, args, kwargs = example("mlp")
    parts = split(model, args, kwargs, 2)
    model[1].eval()
    assert_same_result(parts, model, args, kwargs)


def test_another_rank_cuts_in_the_same_way():
    """From cuts sent as JSON, on a copy of the model; the call is sent as a pickle."""
    model, args, kwargs = example("labels")
    parts = split(model, args, kwargs, 3)
    other = copy.deepcopy(model)
    received = split(other, args, kwargs, 3, cuts=json.loads(json.dumps(parts.cuts)))
    assert (parts.holders, parts.infos, parts.cuts) == (received.holders, received.infos, received.cuts)
    call, values = Call.of(args, kwargs)
    again = pickle.loads(pickle.dumps(call))
    assert again == call
    assert hash(again) == hash(call)
    assert again != Call.of(args, {**kwargs, "scale": True})[0]
    values = parts.stage(0, call)(*values)
    values = received.stage(1, again)(*values)
    assert_same_bits({0: model(*args, **kwargs)["logits"]}, {0: parts.stage(2, call)(*values)["logits"]})


def test_a_cut_that_does_not_exist():
    model, args, kwargs = example("mlp")
    with pytest.raises(TaskError, match=r"different operations of the model .no elsewhere here."):
        split(
            model, args, kwargs, 2, cuts={"kind": "fx", "firsts": ["elsewhere"], "seconds": [1.0, 1.0], "effects": []}
        )


def test_stages_are_cached():
    model, args, kwargs = example("mlp")
    parts = split(model, args, kwargs, 2)
    call, _ = Call.of(args, kwargs)
    assert parts.stage(0, call) is parts.stage(0, call)
    model.eval()
    evaluating = parts.stage(0, call)
    assert not evaluating.training
    model.train()
    assert parts.stage(0, call) is not evaluating


def test_stage_infos():
    """Names are the user's, times add up, parameters are counted once per stage."""
    model, args, kwargs = example("mlp")
    parts = split(model, args, kwargs, 2, at=["2"])
    first, second = parts.infos
    assert (first.stage, first.first, first.last, first.parameters) == (0, "0.0", "1.2", 2 * 72)
    assert (second.stage, second.first, second.last, second.parameters) == (1, "2.0", "4", 2 * 72 + 27)
    assert first.seconds + second.seconds == pytest.approx(sum(parts.costs.values()))
    assert parts.imbalance >= 1


def test_more_stages_from_the_same_trace():
    """Into another number of stages, or each stage further."""
    model, args, kwargs = example("resnet")
    parts = split(model, args, kwargs, 2)
    assert len(parts.into(4).infos) == 4
    fine = parts.refine(2)
    assert fine.bounds[::2] == parts.bounds
    assert_same_result(fine, model, args, kwargs)


@pytest.mark.parametrize(("name", "at"), [
    ("gpt", ["blocks.1", "blocks.3.mlp", "head"]),
    ("resnet", ["layers.1.c2", "head"]),
    ("resnet", ["layers.1.b2.weight"]),
])  # fmt: skip
def test_cuts_where_the_user_says(name, at):
    """Each stage but the first begins with the module, or the parameter, that was named."""
    model, args, kwargs = example(name)
    parts = split(model, args, kwargs, len(at) + 1, at=at)
    for info, where in zip(parts.infos[1:], at, strict=True):
        assert where.removesuffix(".weight") in (info.first, info.first[: len(where)])
    assert_same_result(parts, model, args, kwargs)


@pytest.mark.parametrize(("stages", "at", "says"), [
    (3, ["1"], "3 stages are cut at 2 places, but at= names 1: 1"),
    (2, ["heat"], "no module or parameter 'heat' to cut at. Did you mean 'head'?"),
    (3, ["layers.1", "layers.0"], "'layers.1' before 'layers.0', but forward does not reach it first"),
    (99, [], "ResNet cannot be cut into 99 stages: there are places to cut for"),
])  # fmt: skip
def test_places_that_cannot_be_cut(stages, at, says):
    model, args, kwargs = example("resnet")
    with pytest.raises(PlanError) as caught:
        split(model, args, kwargs, stages, at=at)
    assert says in str(caught.value)


def test_there_is_nothing_before_the_beginning():
    model, args, kwargs = example("mlp")
    with pytest.raises(PlanError, match="the model cannot be cut right before '0'"):
        split(model, args, kwargs, 2, at=["0"])


def test_a_name_inside_a_part_that_stays_whole():
    model, args, kwargs = example("branches")
    with pytest.raises(PlanError, match=r"'3\.b' is inside '3', which stays whole: cut outside of it"):
        split(model, args, kwargs, 2, at=["3.b"])


def test_a_branch_names_the_statement(capfd):
    """The message names the statement and what to do; nothing else is printed."""
    with pytest.raises(TaskError) as caught:
        split(seeded(Branch), (torch.randn(4, 8),), stages=2)
    line = Branch.forward.__code__.co_firstlineno + 2
    assert f"`if x.sum() > 0:` (test_split.py, line {line})" in str(caught.value)
    assert "torch.where" in str(caught.value)
    assert capfd.readouterr() == ("", "")


class Item(Branch):
    def forward(self, x):
        if self.a(x).max().item() > 0.5:
            return self.b(x)
        return x


class Dice(Branch):
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) * random.random()


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.sign()

    @staticmethod
    def backward(_, grad):
        return grad


class OwnBackward(Branch):
    def forward(self, x):
        return self.b(Sign.apply(self.a(x)))


class Own(Branch):
    def forward(self, x):
        class Output:
            value = self.b(torch.relu(self.a(x)))

        return Output()


@pytest.mark.parametrize(("model", "says"), [
    (Item, "if self.a(x).max().item() > 0.5:"),
    (Dice, "draws random numbers with Python"),
    (OwnBackward, "computes gradients its own way (torch.no_grad, an autograd.Function, a reentrant checkpoint)"),
    (Own, "its output contains no tensor"),
])  # fmt: skip
def test_models_that_cannot_be_traced_are_refused(model, says):
    with pytest.raises(TaskError) as caught:
        split(seeded(model), (torch.randn(4, 8),), stages=2)
    assert says in str(caught.value)


def test_an_error_of_the_model_is_its_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        split(mlp(), (torch.randn(4, 9),), stages=2)


def test_other_lengths_are_traced_again():
    """With the same cuts and holders as the first trace."""
    model, args, kwargs = example("gpt")
    parts = split(model, args, kwargs, 2)
    assert_same_result(parts, model, (args[0][:, :7],), kwargs)


def test_an_argument_that_cannot_be_sent():
    with pytest.raises(TaskError, match="called with a set"):
        Call.of(({1},), {})


class Flops:
    """A clock that tells floating-point operations, and moves on a little each time it is read."""

    def __init__(self):
        self.counter, self.reads = None, 0

    def perf_counter(self):
        self.reads += 1
        return self.counter.get_total_flops() + self.reads


@pytest.fixture
def measured_in_flops(monkeypatch):
    """Splits measure nodes in operations, which are the same on every machine, and not in seconds."""
    clock, measure = Flops(), profiling.measure

    def measure_in_flops(trace, values):
        with FlopCounterMode(display=False) as clock.counter:
            return measure(trace, values)

    monkeypatch.setattr(profiling, "time", clock)
    monkeypatch.setattr(importlib.import_module(split.__module__), "measure", measure_in_flops)


@pytest.mark.parametrize(("name", "stages"), [("mlp", 2), ("resnet", 2), ("gpt", 2), ("gpt", 4), ("encoder", 2)])
def test_stages_are_balanced(measured_in_flops, name, stages):
    """The slowest stage takes less than 1.25 of the mean, by what was measured."""
    model, args, kwargs = example(name)
    assert split(model, args, kwargs, stages).imbalance < 1.25
