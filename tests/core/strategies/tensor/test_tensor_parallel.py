"""Tensor parallelism: a split model computes what the whole one computes, and is restored afterwards."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from problems import SGD, classes, seeded
from problems import train as train_task
from split_models import BATCH, GPT, LENGTH, MODELS, WIDTH, Block, encoder, model_and_example, numbers, tokens, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from nbdist.core.comm.world import World
from nbdist.core.strategies.tensor import Group, TensorPlan, derive_plan, parallelize, verify_plan

CLOSE = {"rtol": 0, "atol": 1e-10}


def _split(world, model, *example):
    channel = world.channel()
    plan = verify_plan(model, channel, derive_plan(model, channel.size, example), example)
    return parallelize(model, channel, plan), plan


def _only(size, layers, **more):
    return TensorPlan(size=size, groups=(Group(kind="own", block="", key="own", layers=layers, **more),))


def _traces(model):
    """The attributes and hooks that a split could leave in a module, by name."""
    return {
        name: (dict(module._forward_hooks), type(module), {k: v for k, v in vars(module).items() if k[0] != "_"})
        for name, module in model.named_modules()
    }


def _compare_trainings(world, name):
    model, example = model_and_example(name)
    whole, _ = model_and_example(name)
    outputs, gradients = train(whole, example)
    objects, traces, keys = dict(model.named_parameters()), _traces(model), list(model.state_dict())
    split, plan = _split(world, model, example)
    assert _traces(model).keys() == traces.keys()
    got_outputs, got_gradients = train(model, example)
    torch.testing.assert_close(got_outputs, outputs, **CLOSE)
    channel = world.channel()
    for parameter, gradient in gradients.items():
        cut = split.cuts.get(parameter)
        own = gradient if cut is None else cut.part(gradient, channel.rank, channel.size)
        torch.testing.assert_close(got_gradients[parameter], own, **CLOSE)
    weights = {parameter: split.gather(parameter) for parameter in objects}
    torch.testing.assert_close(weights, dict(whole.named_parameters()), **CLOSE)

    split.restore()
    for parameter, weight in weights.items():
        objects[parameter].data = weight
    assert all(after is objects[parameter] for parameter, after in model.named_parameters())
    assert _traces(model) == traces
    assert not any(p._backward_hooks for p in objects.values())
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(example), whole.eval()(example), **CLOSE)
    return plan


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in MODELS), ("mlp", 4), ("gpt", 4), ("encoder", 4)])
def test_split_training_equals_unsplit_training(run_ranks, name, size):
    """Outputs, gradients and five steps; afterwards the module is restored, with the same objects."""
    plan = run_ranks(size, _compare_trainings, name)[0]
    kinds = {"mlp": "mlp", "gpt": "attention", "encoder": "attention", "fused": "attention", "nano": "mlp"}
    assert name not in kinds or kinds[name] in {group.kind for group in plan.groups}
    if name == "nano":
        assert "attention" not in {group.kind for group in plan.groups}
        assert plan.layers["blocks.0.qkv"] == "column_gather"
        assert "split layer by layer" in plan.reasons["blocks.0"]
    if name in ("gpt", "nano"):
        assert (plan.layers["wte"], plan.layers["head"]) == ("embedding", "column_gather")
    if name == "residual":
        assert list(plan.layers) == ["fc"]


def _in_float32(world, autocast):
    make, _ = MODELS["gpt"]
    model, whole = seeded(make), seeded(make)
    for part in (model, whole):
        part.wpe.weight.requires_grad_(False)
        part.blocks[0].up.weight.requires_grad_(False)
    split, _ = _split(world, model, tokens())
    results = []
    for one in (whole, model):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = one(tokens())
        out.float().square().mean().backward()
        results.append((out.detach(), one.norm.weight.grad))
    tolerance = 5e-2 if autocast else 1e-5
    assert results[0][0].dtype == results[1][0].dtype
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    assert model.blocks[0].up.weight.grad is None
    assert "blocks.0.up.weight" in split.cuts


@pytest.mark.parametrize("autocast", [False, True])
def test_other_precisions_and_frozen_weights(run_ranks, autocast):
    """float32, with and without autocast to bfloat16; frozen layers are split too, and stay frozen."""
    run_ranks(2, _in_float32, autocast)


def _export(world):
    model = seeded(lambda: GPT(functools.partial(Block, 0.0)), torch.float64)
    whole = seeded(lambda: GPT(functools.partial(Block, 0.0)), torch.float64)
    split, _ = _split(world, model, tokens())
    exported = torch.export.export(model, (tokens(),), strict=False).module()
    called = {str(node.target) for node in exported.graph.nodes if "nbdist" in str(node.target)}
    assert called == {"nbdist.copy_in.default", "nbdist.sum_out.default", "nbdist.gather_out.default"}
    for one in (whole, exported):
        one(tokens()).square().mean().backward()
    torch.testing.assert_close(exported(tokens()), whole(tokens()), **CLOSE)
    channel = world.channel()
    for name, parameter in whole.named_parameters():
        cut = split.cuts.get(name)
        own = parameter.grad if cut is None else cut.part(parameter.grad, channel.rank, channel.size)
        torch.testing.assert_close(dict(exported.named_parameters())[name].grad, own, **CLOSE)
    split.restore()
    with pytest.raises(RuntimeError, match="traced while the model was split"):
        exported(tokens())


def test_an_exported_model_runs_its_collectives(run_ranks):
    """The exported graph contains them; its forward and backward are those of the whole model."""
    run_ranks(2, _export)


def _trace_with_fx(world):
    model, example = model_and_example("mlp")
    expected = model.eval()(example)
    split, _ = _split(world, model, example)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(example), expected, **CLOSE)
    split.restore()


def test_an_fx_graph_calls_the_split_layers(run_ranks):
    """torch's layers are leaves of the fx graph, and run with their replaced forward."""
    run_ranks(2, _trace_with_fx)


def _embeddings(world):
    table = seeded(lambda: nn.Embedding(8, 4, padding_idx=5), torch.float64)
    indices = torch.tensor([[0, 7, 3], [5, 4, 5]])
    expected = table(indices)
    expected.square().sum().backward()
    gradient = table.weight.grad
    split = parallelize(table, world.channel(), _only(2, {"": "embedding"}))
    table(indices).square().sum().backward()
    torch.testing.assert_close(table(indices), expected, **CLOSE)
    channel = world.channel()
    torch.testing.assert_close(table.weight.grad, split.cuts["weight"].part(gradient, channel.rank, 2), **CLOSE)
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([0, wrong]))


def test_an_embedding_over_ranks(run_ranks):
    """Rows of another rank, the padding row, and an index out of range, which is an error on every rank."""
    run_ranks(2, _embeddings)


def _attentions(world):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    each = torch.arange(BATCH * 4 * LENGTH * LENGTH, dtype=torch.float64).sin().view(BATCH * 4, LENGTH, LENGTH)
    calls = [
        {}, {"average_attn_weights": False}, {"need_weights": False}, {"attn_mask": mask, "need_weights": False},
        {"attn_mask": mask, "is_causal": True, "need_weights": False}, {"key_padding_mask": padding, "attn_mask": mask},
        {"attn_mask": each}, {"key_padding_mask": padding, "need_weights": False},
    ]  # fmt: skip
    makes = [{}, {"batch_first": True}, {"batch_first": True, "dropout": 0.3, "bias": False}, {"kdim": 8, "vdim": 12}]
    for options in makes:
        for call in calls:
            results = []
            for split in (False, True):
                model = seeded(functools.partial(nn.MultiheadAttention, WIDTH, 4, **options), torch.float64)
                if split:
                    parallelize(model, world.channel(), _only(2, {"": "attention"}))
                q = numbers(BATCH, LENGTH, WIDTH).requires_grad_()
                k, v = (q[..., : options[d]].clone() if d in options else q for d in ("kdim", "vdim"))
                inputs = [x if options.get("batch_first") else x.transpose(0, 1) for x in (q, k, v)]
                inputs = inputs if "kdim" in options else [inputs[0]] * 3
                torch.manual_seed(0)
                out, weights = model(*inputs, **call)
                (out * out.detach().cos()).sum().backward()
                results.append((F.dropout(out.detach(), 0.5), weights, q.grad))
            torch.testing.assert_close(*results, **CLOSE)
    alone = seeded(functools.partial(nn.MultiheadAttention, WIDTH, 4), torch.float64)
    x = numbers(LENGTH, WIDTH)
    expected = alone(x, x, x)
    parallelize(alone, world.channel(), _only(2, {"": "attention"}))
    torch.testing.assert_close(alone(x, x, x), expected, **CLOSE)


def test_multihead_attention_with_all_options(run_ranks):
    """Masks, weights, layouts, widths of keys and values, dropout, and a sample without a batch."""
    run_ranks(2, _attentions)


def _with_padding(world):
    model = seeded(encoder, torch.float64).eval()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    example = numbers(BATCH, LENGTH, WIDTH)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = model(example, src_key_padding_mask=padding)
    split, _ = _split(world, model, example)
    kept = ~padding.unsqueeze(-1)
    torch.testing.assert_close(model(example, src_key_padding_mask=padding) * kept, expected * kept, **CLOSE)
    split.restore()


def test_the_fast_path_of_torch_is_off(run_ranks):
    """In evaluation the fast path of torch's encoder would read weights without calling their layers."""
    run_ranks(2, _with_padding)


class _Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return checkpoint(lambda x: self.down(torch.tanh(self.up(x))), self.first(x), use_reentrant=True)


def _checkpointed(world, options):
    return train_task(world, seeded(_Checkpointed, torch.float64), classes(16), optimizer=SGD, batch_size=8, **options)[
        1
    ]


def test_a_checkpointed_block(run_ranks):
    """Reentrant checkpointing allows a backward only, and no gradient of chosen tensors."""
    expected = _checkpointed(World(), {})
    for actual in run_ranks(2, _checkpointed, {"strategy": "tensor"}):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
