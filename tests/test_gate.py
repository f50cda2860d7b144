"""The gate of the tests: it holds the ranks of a run, and fails the test if it cannot."""

from __future__ import annotations

import pytest
import torch
from gate import Gate
from torch import nn

pytestmark = pytest.mark.engines

DATA = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)
OPTIONS = {"loss": "cross_entropy", "batch_size": 16, "background": True}


def test_all_ranks_are_held_after_the_step_until_the_gate_is_opened(cluster, tmp_path):
    """No rank advances, however long the test takes; then they end."""
    gate = Gate(tmp_path, 5)
    run = cluster.train(nn.Linear(6, 3), DATA, steps=8, lr_scheduler=gate, **OPTIONS)
    gate.wait(5, run=run)
    assert not run.ended
    assert run.progress.step <= 5
    gate.open(5)
    assert ("finished", 8) == (run.wait().state, run.progress.step)


def test_a_run_that_cannot_be_held_fails_the_test_in_a_sentence(cluster, tmp_path):
    """It has one step and the gate is after the fifth: it ends, and the test does not wait forever."""
    gate = Gate(tmp_path, 5)
    run = cluster.train(nn.Linear(6, 3), DATA, steps=1, lr_scheduler=gate, **OPTIONS)
    with pytest.raises(AssertionError, match=r"finished at step 1, and rank 0 was never held at the gate 5: it does"):
        gate.wait(5, run=run)


def test_a_command_that_was_given_to_held_ranks_is_received_in_the_next_step(cluster, tmp_path):
    """On any machine: the step after the one at which they were held is the last."""
    gate = Gate(tmp_path, 5)
    run = cluster.train(nn.Linear(6, 3), DATA, steps=10**9, lr_scheduler=gate, **OPTIONS)
    gate.wait(5, run=run)
    run.stop()
    gate.open(5)
    assert ("stopped", 6) == (run.wait().state, run.progress.step)
