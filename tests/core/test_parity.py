"""Promise number one: any number of ranks trains as one process that runs the same slices."""

from __future__ import annotations

import pytest
import torch
from problems import OPTIMIZERS, SGD, alone, assert_same_bits, classes, losses, mlp, train, weights
from torch.nn import functional as F

import nbdist
from nbdist.core.comm.world import World

SAMPLES, BATCH, EPOCHS = 65, 24, 2  # the last batch of an epoch holds 17

# Only the order in which slices are added differs. float64 keeps 16 digits; in float32 one rounding is 6e-8 of a
# gradient, and six steps carry it into the weights, where AdamW first divides it by the gradient's own size.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

CASES = [(dtype, optimizer) for dtype in TOLERANCE for optimizer in OPTIMIZERS]


def run(world, cases, *, accumulate, dropout=0.3, samples=SAMPLES):
    return [
        train(
            world, mlp(dtype, dropout), classes(samples, dtype), batch_size=BATCH, accumulate=accumulate,
            epochs=EPOCHS, optimizer=OPTIMIZERS[optimizer], check="no",
        )
        for dtype, optimizer in cases
    ]  # fmt: skip


def run_twice(world, cases, accumulate):
    return run(world, cases, accumulate=accumulate), run(world, cases, accumulate=accumulate)


def assert_close(expected, actual, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.parity)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_equal_one_process_that_runs_the_same_slices(run_on_each_channel, size, accumulate):
    """Losses and weights agree to rounding, dropout included; replicas and repetitions agree bit for bit."""
    expected = run(World(), CASES, accumulate=size * accumulate)
    ranks = run_on_each_channel(size, run_twice, CASES, accumulate)
    for i, (dtype, _) in enumerate(CASES):
        result, trained = ranks[0][0][i]
        assert_close(losses(expected[i][0]), losses(result), TOLERANCE[dtype])
        assert_close(expected[i][1], trained, TOLERANCE[dtype])
        for again in (twice[i] for rank in ranks for twice in rank):
            assert losses(result) == losses(again[0])
            assert_same_bits(trained, again[1])


def run_once_a_rank(world, samples):
    return run(world, CASES, accumulate=1, samples=samples)


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.parity)])
@pytest.mark.parametrize("samples", [2 * BATCH, SAMPLES])
def test_one_slice_a_rank_gives_the_bits_of_one_process(run_on_each_channel, size, samples):
    """N ranks add N gradients in the order in which one process accumulates them: the weights are identical."""
    expected = run(World(), CASES, accumulate=size, samples=samples)
    for (_, weights_alone), (_, trained) in zip(
        expected, run_on_each_channel(size, run_once_a_rank, samples)[0], strict=True
    ):
        assert_same_bits(weights_alone, trained)


def run_in_order(world, loss):
    x, y = classes(SAMPLES)
    y = y if loss == "cross_entropy" else F.one_hot(y, 3).double()
    return [
        train(world, mlp(), (x, y), loss=loss, batch_size=BATCH, shuffle=False, epochs=EPOCHS, optimizer=make)
        for make in OPTIMIZERS.values()
    ]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_ranks_equal_a_loop_written_by_hand(run_on_each_channel, loss):
    """Three ranks train as ordinary PyTorch does on the whole batch."""
    x, y = classes(SAMPLES)
    function = F.cross_entropy if loss == "cross_entropy" else F.mse_loss
    y = y if loss == "cross_entropy" else F.one_hot(y, 3).double()
    for make, (result, trained) in zip(OPTIMIZERS.values(), run_on_each_channel(3, run_in_order, loss)[0], strict=True):
        model, history = mlp(), []
        optimizer = make(model.parameters())
        for _ in range(EPOCHS):
            total = 0.0
            for batch_x, batch_y in zip(x.split(BATCH), y.split(BATCH), strict=True):
                optimizer.zero_grad()
                value = function(model(batch_x), batch_y)
                value.backward()
                optimizer.step()
                total += value.item() * len(batch_x)
            history.append(total / SAMPLES)
        assert_close(history, losses(result), 1e-12)
        assert_close(weights(model), trained, 1e-12)


def train_through_the_front_door(world):
    model = mlp(torch.float32)
    with torch.no_grad():
        next(model.parameters()).add_(world.rank)  # rank 0's weights are the ones that count
    result = nbdist.train(
        model, classes(SAMPLES, torch.float32), loss="cross_entropy", optimizer=SGD, batch_size=BATCH, threads=1,
        device="cpu", verbose=False,
    )  # fmt: skip
    return result, weights(model)


def test_nbdist_train_uses_an_initialised_process_group(run_ranks):
    """It trains over all of its ranks, from rank 0's weights."""
    expected = alone(mlp(torch.float32), classes(SAMPLES, torch.float32), optimizer=SGD, batch_size=BATCH, accumulate=2)
    for result, trained in run_ranks(2, train_through_the_front_door):
        assert 2 == result.plan.mesh.dp
        assert losses(expected[0]) == losses(result)
        assert_same_bits(expected[1], trained)
