"""Metrics of all forms on meshes: each is what plain PyTorch in one process measures on the whole set."""

from __future__ import annotations

import pytest
import torch
from cells import ranks_of
from measured import CASES, MESHES, as_tensor, in_one_process, run_case

# What `make test` runs: every metric, and every mesh.
PART = {
    ("F1", "dp=4"), ("AUROC", "dp=2"), ("R2, in place", "dp=2,pp=2"), ("R2, own class", "pp=2"),
    ("confusion matrix", "shard=2"), ("corpus score of strings", "dp=3"), ("weighted mean", "dp=2"),
    ("F1, module", "dp=2"), ("collection", "dp=2,shard=2"), ("mean of batches", "dp=4"), ("F1, stream", "dp=3"),
    ("mean of batches, stream", "dp=2"), ("perplexity, causal", "dp=2"), ("accuracy, causal", "pp=2"),
    ("accuracy, masked", "tp=2"), ("loss of a dict's labels", "dp=3"), ("F1, module", "dp=1"),
    ("evaluate, of all kinds", "pp=2"), ("evaluate, a stream", "dp=3"), ("evaluate, labels of a dict", "dp=2"),
    ("the step's log", "dp=4"),
}  # fmt: skip
CELLS = [
    pytest.param(mesh, name, marks=[] if (name, mesh) in PART else pytest.mark.compatibility)
    for name in CASES for mesh in MESHES
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "name"), CELLS)
def test_a_metric_is_that_of_one_process(run_ranks, mesh, name):
    """In the second epoch, so that nothing is left of the first; the same on every rank."""
    results = run_ranks(ranks_of(mesh), run_case, name, mesh, 2)
    row, weights = results[0]
    expected = in_one_process(name, weights)
    found = {key: as_tensor(row[key]) for key in expected}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.keys() | {"val_loss"} == {key for key in row if key.startswith("val_")}
    measured = [{key: other[key] for key in [*expected, "val_loss"]} for other, _ in results]
    assert measured == [measured[0]] * len(results)


def test_every_metric_and_every_mesh_is_in_make_test():
    """At least one cell each."""
    assert set(CASES) == {name for name, _ in PART}
    assert set(MESHES) == {mesh for _, mesh in PART}
