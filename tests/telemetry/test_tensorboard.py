"""TensorBoard gets the panel's numbers."""

from __future__ import annotations

import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.telemetry.tensorboard import TensorBoardSink

DATA = torch.randn(64, 6), torch.zeros(64, dtype=torch.long)


def read(folder):
    """Scalars by tag: pairs of step and value."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(reported.step, reported.value) for reported in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def test_a_run_can_be_read_in_tensorboard(cluster, tmp_path):
    """Each run in its own folder, by step; from an engine."""
    run = cluster.train(
        nn.Linear(6, 3), DATA, loss="cross_entropy", epochs=2, batch_size=16, lr=0.5, val=DATA, metric="accuracy",
        tensorboard=str(tmp_path),
    )  # fmt: skip
    scalars = read(tmp_path / run.run_id)
    assert {"loss/train", "learning rate", "samples per second", "loss/validation", "accuracy/validation"} == set(
        scalars
    )
    assert list(range(1, 9)) == [step for step, _ in scalars["loss/train"]]
    assert pytest.approx([row["val_loss"] for row in run.history]) == [v for _, v in scalars["loss/validation"]]
    assert [4, 8] == [step for step, _ in scalars["loss/validation"]]
    assert {0.5} == {value for _, value in scalars["learning rate"]}


def test_a_missing_package_is_named_at_once(monkeypatch):
    """Before any engine is called."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(PlanError, match=r"tensorboard=tb needs a package .*: pip install 'nbdist\[tensorboard\]'"):
        Plan.create(ranks=1, cores=1, tensorboard="tb")


def test_a_folder_that_cannot_be_written(tmp_path):
    """The error names the folder."""
    (tmp_path / "file").touch()
    with pytest.raises(TaskError, match="file cannot be written"):
        TensorBoardSink(str(tmp_path / "file"), "run")
