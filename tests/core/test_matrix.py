"""A part of the parity matrix, so that each model and each axis is there; ``make parity`` runs it whole."""

from __future__ import annotations

import matrix
import pytest
import torch

# A mesh with a model that asks something of it.
PART = {
    "dp=3": "GPT, tied", "pp=2": "ResNet-18", "tp=2": "TransformerEncoder", "shard=2": "LSTM", "shard=4": "MLP",
    "pp=4": "U-Net", "dp=2,pp=2": "Sequential",
}  # fmt: skip


def test_the_part_holds_every_model():
    """And no mesh or model that the matrix does not know."""
    assert set(matrix.CASES) == set(PART.values())
    assert set(PART) <= set(matrix.MESHES)


@pytest.mark.programs
@pytest.mark.parametrize(("mesh", "model"), PART.items())
def test_a_mesh_equals_one_process(run_ranks, mesh, model):
    """In float64 to 1e-10: two optimizers, one and three microbatches a step, a last, smaller batch."""
    size = matrix.Mesh.parse(mesh, matrix.ranks_of(mesh)).size
    results = run_ranks(size, matrix.run_cell, model, mesh, torch.float64)
    assert not isinstance(results[0], str), results[0]
    assert matrix.difference(model, mesh, torch.float64, results[0]) < matrix.EXACT


def test_what_is_not_possible_says_why(run_ranks):
    """A cell of the table then holds the reason that a user is given."""
    reason = run_ranks(2, matrix.run_cell, "U-Net", "tp=2", torch.float64)[0]
    assert reason.startswith("nothing of UNet can be split over 2 ranks: d1 is a Conv2d")
