"""Copies of the weights in a run, their moving average and those of the best epoch: on every mesh, and resumed."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import FEATURES, SGD, alone, assert_same_bits, classes, losses, mlp, seeded, train
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nbdist.core.strategies import choice
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan

DECAY = 0.9
SAMPLES = 16
OPTIONS = {"optimizer": SGD, "batch_size": 8, "shuffle": False, "epochs": 3}
MESHES = [("dp=1", 1), ("dp=2", 2), ("shared", 2), ("shard=2", 2), ("tp=2", 2), ("pp=2", 2), ("dp=2,shard=2", 4)]


def with_norm():
    """A model with parameters, a frozen one, and running statistics."""
    model = seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.float64)
    model[2].bias.requires_grad_(False)
    return model


def fit_on(world, mesh, make, data, options):
    choice.SHARED_ABOVE = 0 if mesh == "shared" else 1 << 40
    strategy = "dp=2" if mesh == "shared" else mesh
    result, weights = train(world, make(), data, strategy=strategy, **OPTIONS | options)
    return result, weights


def plain_average(make, decay):
    """A plain loop, with torch's own average: it begins at the first weights."""
    model, (x, y) = make(), classes(SAMPLES)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first call copies
    optimizer = SGD([p for p in model.parameters() if p.requires_grad])
    for _ in range(OPTIONS["epochs"]):
        for start in range(0, SAMPLES, OPTIONS["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(model(x[start : start + 8]), y[start : start + 8]).backward()
            optimizer.step()
            average.update_parameters(model)
    return dict(average.module.named_parameters())


@pytest.mark.parametrize(("mesh", "ranks"), MESHES)
def test_the_average_is_that_of_a_plain_loop(run_ranks, mesh, ranks):
    """Wherever the parts of the weights are."""
    options = {"ema": DECAY, ("microbatches" if "pp" in mesh else "accumulate"): 2}
    expected = plain_average(mlp, DECAY)
    for result, weights in run_ranks(ranks, fit_on, mesh, mlp, classes(SAMPLES), options):
        assert expected.keys() == result.average.keys()
        for name, average in result.average.items():
            torch.testing.assert_close(average, expected[name].detach(), rtol=1e-10, atol=1e-12)
            assert not torch.equal(average, weights[name])


def test_one_rank_has_the_bits_of_torch():
    """Of `AveragedModel`, whose average begins at the first weights."""
    result, _ = alone(mlp(), classes(SAMPLES), ema=DECAY, **OPTIONS)
    assert_same_bits({name: p.detach() for name, p in plain_average(mlp, DECAY).items()}, result.average)


def test_an_average_of_half_precision_moves():
    """It is kept in float32: steps of a thousandth of the distance would be rounded away."""
    result, weights = alone(
        mlp(torch.bfloat16), classes(SAMPLES, torch.bfloat16), ema=0.999, **OPTIONS | {"epochs": 40}
    )
    first = mlp(torch.bfloat16).state_dict()
    moved = [not torch.equal(result.average[name], first[name]) for name in first]
    assert all(moved)
    assert all(average.dtype == torch.bfloat16 for average in result.average.values())
    assert not any(torch.equal(result.average[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("before", "after"), [("dp=2", "dp=2"), ("shared", "shared"), ("shard=2", "tp=2"), ("pp=2", "dp=2")]
)
def test_the_average_is_resumed(run_ranks, tmp_path, before, after):
    """From a checkpoint, on any mesh."""
    whole = run_ranks(2, fit_on, before, mlp, classes(SAMPLES), {"ema": DECAY})[0][0]
    options = {"ema": DECAY, "checkpoint": str(tmp_path)}
    run_ranks(2, fit_on, before, mlp, classes(SAMPLES), {**options, "epochs": 2})
    resumed = run_ranks(2, fit_on, after, mlp, classes(SAMPLES), {**options, "resume": True})[0][0]
    if before == after:
        assert_same_bits(whole.average, resumed.average)
    for name, average in resumed.average.items():
        torch.testing.assert_close(average, whole.average[name], rtol=1e-10, atol=1e-12)


def scored(model, batch, scores, calls):
    """A step that logs one score for each epoch."""
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    calls.append(0)
    return loss, {"score": scores[min((len(calls) - 1) // 2, len(scores) - 1)]}


def scores(*values):
    return functools.partial(scored, scores=values, calls=[])


@pytest.mark.parametrize(("mesh", "ranks"), [case for case in MESHES if case[0] not in ("tp=2", "pp=2")])
@pytest.mark.parametrize(("values", "best"), [((1.0, 5.0, 4.0), 2), ((5.0, 4.0, 5.0), 1), ((1.0, 2.0, 3.0), 3)])
def test_the_model_gets_the_weights_of_the_best_epoch(run_ranks, mesh, ranks, values, best):
    """And its running statistics; an equal epoch later is no better."""
    options = {"check": "no", "step": scores(*values)}
    expected = run_ranks(ranks, fit_on, mesh, with_norm, classes(SAMPLES), {**options, "epochs": best})
    found = run_ranks(ranks, fit_on, mesh, with_norm, classes(SAMPLES), {**options, "keep_best": "score"})
    for (_, weights), (result, kept) in zip(expected, found, strict=True):
        assert len(values) == len(result.history)
        assert_same_bits(weights, kept)


@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_parts_of_layers_too(run_ranks, mesh):
    """Of the epoch with the lowest validation loss, which is not the last one at this rate."""
    options = {"val": classes(40), "optimizer": functools.partial(torch.optim.SGD, lr=2.0), "epochs": 6}
    data = classes(SAMPLES)[0], torch.randint(3, (SAMPLES,), generator=torch.Generator().manual_seed(5))
    result, kept = run_ranks(2, fit_on, mesh, mlp, data, {**options, "keep_best": "val_loss"})[0]
    rows = [row["val_loss"] for row in result.history]
    best = rows.index(min(rows)) + 1
    assert best < len(rows)
    _, weights = run_ranks(2, fit_on, mesh, mlp, data, {**options, "epochs": best})[0]
    assert_same_bits(weights, kept)


@pytest.mark.parametrize(
    ("before", "after"), [("dp=2", "dp=2"), ("shared", "shared"), ("shard=2", "shard=2"), ("shard=2", "dp=2")]
)
def test_the_best_epoch_outlives_a_resume(run_ranks, tmp_path, before, after):
    """It was before the checkpoint, and stays the best one; later ones start from the last weights."""
    options = {"check": "no"}
    best = run_ranks(2, fit_on, before, with_norm, classes(SAMPLES), {**options, "epochs": 1, "step": scores(1.0)})[0][
        1
    ]
    whole = run_ranks(2, fit_on, before, with_norm, classes(SAMPLES), {**options, "epochs": 4, "step": scores(1.0)})[0][
        0
    ]
    options |= {"checkpoint": str(tmp_path), "keep_best": "score"}
    steps = scores(9.0, 5.0), scores(1.0)
    run_ranks(2, fit_on, before, with_norm, classes(SAMPLES), {**options, "epochs": 2, "step": steps[0]})
    result, kept = run_ranks(
        2, fit_on, after, with_norm, classes(SAMPLES), {**options, "epochs": 4, "step": steps[1], "resume": True}
    )[0]
    assert_same_bits(best, kept)
    if before == after:
        assert losses(whole) == losses(result)


@pytest.mark.parametrize("mesh", ["dp=2", "shared", "shard=2"])
def test_a_run_without_a_step_left_has_the_best_epoch_too(run_ranks, tmp_path, mesh):
    """Resumed after its last step."""
    options = {"check": "no", "checkpoint": str(tmp_path), "keep_best": "score", "step": scores(9.0, 5.0, 1.0)}
    _, kept = run_ranks(2, fit_on, mesh, with_norm, classes(SAMPLES), options)[0]
    early = {**options, "early_stop": "score:2", "resume": True, "epochs": 9}
    result, again = run_ranks(2, fit_on, mesh, with_norm, classes(SAMPLES), early)[0]
    assert 3 == len(result.history)
    assert_same_bits(kept, again)


def test_a_checkpoint_without_a_best_epoch(tmp_path):
    """Was written without `keep_best`: the epochs that follow are compared."""
    options = OPTIONS | {"check": "no", "checkpoint": str(tmp_path)}
    alone(with_norm(), classes(SAMPLES), **options | {"epochs": 1, "step": scores(9.0)})
    resumed = options | {"resume": True, "epochs": 3, "step": scores(2.0, 1.0), "keep_best": "score"}
    _, kept = alone(with_norm(), classes(SAMPLES), **resumed)
    _, weights = alone(with_norm(), classes(SAMPLES), **OPTIONS | {"check": "no", "epochs": 2, "step": scores(1.0)})
    assert_same_bits(weights, kept)


class Growing(nn.Module):
    """Replaces a buffer by a larger one in each forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.layer(x)


def test_what_cannot_be_kept_is_a_sentence():
    """A buffer that grows, and state that is no tensor."""
    with pytest.raises(TaskError, match="keep_best cannot keep buffer seen, which the model changes from shape"):
        alone(Growing(), classes(SAMPLES), keep_best="loss", **OPTIONS)

    class Counting(nn.Linear):
        def get_extra_state(self):
            return 1

        def set_extra_state(self, state):
            pass

    with pytest.raises(TaskError, match="keep_best keeps weights and buffers, but the model has state beside them"):
        alone(Counting(FEATURES, 3, dtype=torch.float64), classes(SAMPLES), keep_best="loss", **OPTIONS)


@pytest.mark.parametrize("decay", [1.0, 2.0])
def test_a_decay_is_below_one(decay):
    """Else the average never moves."""
    with pytest.raises(PlanError, match=f"ema={decay} would keep the first weights"):
        Plan.create(ranks=1, cores=1, ema=decay)
