"""Optimizers with a closure or with modes, sent to engines and back."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

STEPS, BATCH = 3, 8


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (STEPS * BATCH,), generator=generator)


def by_hand(model, optimizer):
    x, y = data()
    for rows in torch.arange(len(x)).split(BATCH):

        def closure(rows=rows):
            optimizer.zero_grad()
            total = 0
            for part in rows.chunk(2):
                loss = F.cross_entropy(model(x[part]), y[part]) / 2
                loss.backward()
                total = total + loss.detach()
            return total

        optimizer.step(closure)


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_ready_made_lbfgs_comes_back_with_its_state(cluster, compile_it):
    """Weights and state are those of one process; a compiled model stays the user's object, with its names."""
    make = functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    expected, model = net(), net()
    optimizer, by_itself = make(model.parameters()), make(expected.parameters())
    by_hand(expected, by_itself)
    trained = torch.compile(model, backend="eager") if compile_it else model
    run = cluster.train(
        trained, data(), loss="cross_entropy", optimizer=optimizer, batch_size=BATCH, steps=STEPS, shuffle=False
    )
    assert "finished" == run.state
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=1e-9)
    (state,), (own,) = optimizer.state.values(), by_itself.state.values()
    assert own["n_iter"] == state["n_iter"]
    torch.testing.assert_close(state["d"], own["d"], rtol=0, atol=1e-9)
