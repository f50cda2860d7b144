"""Buffers that a forward makes, or gives another shape, are part of the state of a run."""

from __future__ import annotations

import pytest
import torch
from problems import alone, classes, seeded, stop_after, train
from torch import nn

from nbdist.core.params.made_buffers import adopt_buffers, persistence
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.restore import load_whole
from nbdist.core.state.snapshot import SnapshotStore


class Makes(nn.Module):
    """It makes a buffer in the first forward, registers another, lets one grow, and gives one another dtype."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 3)
        self.register_buffer("late", None)
        self.register_buffer("grown", torch.zeros(1))
        self.register_buffer("kind", torch.zeros((), dtype=torch.int32))

    def forward(self, x):
        if self.training:
            self.late = torch.ones(3) if self.late is None else self.late + 1
            if not hasattr(self, "fresh"):
                self.register_buffer("fresh", torch.zeros(2), persistent=False)
            self.fresh += 1
            self.grown = torch.ones(len(self.grown) + 1)
            self.kind = self.kind.double() + 1
        return self.line(x)


OPTIONS = {"optimizer": "sgd", "batch_size": 8, "epochs": 2}
STEPS = 10


def net():
    return seeded(Makes, torch.float32)


def buffers(model):
    assert persistence(model)["late"]
    assert not persistence(model)["fresh"]
    return [(b.dtype, b.tolist()) for _, b in sorted(model.named_buffers())]


def expected(steps):
    both = [(torch.float32, [float(steps)] * 2), (torch.float32, [1.0] * (steps + 1))]
    return [*both, (torch.float64, float(steps)), (torch.float32, [float(steps)] * 3)]


def run(world, options):
    model = net()
    train(world, model, classes(40, torch.float32), strategy="data", **OPTIONS, **options)
    return buffers(model)


def interrupted(world, options):
    return run(world, {**options, "commands": stop_after(3)})


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_goes_on_with_them(run_ranks, tmp_path, where):
    """From a snapshot and from a checkpoint; an ordinary model takes them too."""
    store, folder = SnapshotStore(2), str(tmp_path)
    kept = {"snapshot_paths": store.paths} if where == "memory" else {"checkpoint": folder}
    assert [expected(3)] * 2 == run_ranks(2, interrupted, kept)
    saved = CheckpointReader.of_snapshot(store.paths) if where == "memory" else CheckpointReader.in_folder(folder)
    model = net()
    load_whole(saved, model)
    assert expected(3) == buffers(model)
    again = {**kept, "from_snapshot": True} if where == "memory" else {**kept, "resume": folder}
    assert [expected(STEPS)] * 2 == run_ranks(2, run, again)
    store.close()


def test_another_number_of_ranks_takes_them(run_ranks, tmp_path):
    """Those of rank 0, or their mean."""
    run_ranks(2, interrupted, {"checkpoint": str(tmp_path)})
    model = net()
    alone(model, classes(40, torch.float32), resume=str(tmp_path), **OPTIONS)
    assert expected(STEPS) == buffers(model)


def test_a_model_adopts_the_buffers_of_another():
    """Those that are alike stay the same objects; others are made, replaced or removed."""
    model, other = Makes(), Makes()
    other(torch.ones(1, 6))
    other.register_buffer("more", torch.ones(1))
    model.register_buffer("only", torch.ones(1))
    before = model.line
    adopt_buffers(model, dict(other.named_buffers()), persistence(other))
    assert {name: b.tolist() for name, b in other.named_buffers()} == {n: b.tolist() for n, b in model.named_buffers()}
    assert persistence(other) == persistence(model)
    assert model.only is None
    assert before is model.line
    grown = model.grown
    adopt_buffers(model, dict(other.named_buffers()), persistence(other))
    assert grown is model.grown
    assert model.grown.data_ptr() != other.grown.data_ptr()


def test_the_notebooks_model_has_them(shared_cluster):
    """After a run on engines."""
    cluster, model = shared_cluster.ready(), net()
    cluster.train(model, classes(40, torch.float32), loss="cross_entropy", **OPTIONS)
    assert expected(STEPS) == buffers(model)
