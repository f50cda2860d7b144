"""A model that is split computes what the whole one computes, and is restored afterwards."""

from __future__ import annotations

import pytest
import torch
from problems import SGD, classes, seeded
from problems import train as train_task
from split_models import BATCH, LENGTH, MODELS, WIDTH, encoder, model_and_example, numbers, split, tokens, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from nbdist.core.comm.world import World

CLOSE = {"rtol": 0, "atol": 1e-10}


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
    parts, plan = split(world, model, example)
    assert _traces(model).keys() == traces.keys()
    got_outputs, got_gradients = train(model, example)
    torch.testing.assert_close(got_outputs, outputs, **CLOSE)
    channel = world.channel()
    for parameter, gradient in gradients.items():
        cut = parts.cuts.get(parameter)
        own = gradient if cut is None else cut.part(gradient, channel.rank, channel.size)
        torch.testing.assert_close(got_gradients[parameter], own, **CLOSE)
    weights = {parameter: parts.gather(parameter) for parameter in objects}
    torch.testing.assert_close(weights, dict(whole.named_parameters()), **CLOSE)

    parts.restore()
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
    parts, _ = split(world, model, tokens())
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
    assert "blocks.0.up.weight" in parts.cuts


@pytest.mark.parametrize("autocast", [False, True])
def test_other_precisions_and_frozen_weights(run_ranks, autocast):
    """float32, with and without autocast to bfloat16; frozen layers are split too, and stay frozen."""
    run_ranks(2, _in_float32, autocast)


def _with_padding(world):
    model = seeded(encoder, torch.float64).eval()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    example = numbers(BATCH, LENGTH, WIDTH)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = model(example, src_key_padding_mask=padding)
    parts, _ = split(world, model, example)
    kept = ~padding.unsqueeze(-1)
    torch.testing.assert_close(model(example, src_key_padding_mask=padding) * kept, expected * kept, **CLOSE)
    parts.restore()


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
