"""Replicas that drift apart are noticed at the end of an epoch, and before a checkpoint is written."""

from __future__ import annotations

import pytest
import torch
from problems import classes, mlp, train

from nbdist.errors import TaskError


class Drawing(torch.optim.SGD):
    """Adds noise to the weights, from torch's generator, which each slice seeds differently."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(1e-9 * torch.randn_like(parameter))


def drifts(world, optimizer, **options):
    model = mlp()
    try:
        optimizer = optimizer(model.parameters(), 0.1)
        train(world, model, classes(32), optimizer=optimizer, batch_size=8, epochs=2, **options)
    except TaskError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("channel", ["shared memory", "process group"])
def test_drift_is_an_error_that_names_the_first_tensor(run_ranks, channel):
    """On every rank, after the first epoch."""
    for error in run_ranks(2, drifts, Drawing, channel=channel):
        assert error.startswith("after step 4 0.weight differs between replica ")
    assert run_ranks(2, drifts, torch.optim.SGD, channel=channel) == ["", ""]


def drifts_into(world, folder):
    return drifts(world, Drawing, checkpoint=folder, checkpoint_every=2)


def test_no_checkpoint_of_drifted_replicas_is_written(run_ranks, tmp_path):
    """The run ends at the first one instead."""
    for error in run_ranks(2, drifts_into, str(tmp_path)):
        assert error.startswith("after step 2 0.weight differs between replica ")
    assert [] == [*tmp_path.glob("*/checkpoint.json")]
