"""The parity table over hosts: every mesh of two and four ranks, beside a loop that is written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import nbdist

sys.path.append(str(Path(__file__).parents[1] / "core"))

import matrix

# Each model is there, on a mesh that asks something of it.
MODELS = {
    "dp=2": "GPT, tied", "pp=2": "ResNet-18", "tp=2": "TransformerEncoder", "shard=2": "LSTM", "dp=4": "Sequential",
    "shard=4": "MLP", "pp=4": "U-Net", "dp=2,pp=2": "Sequential", "dp=2,tp=2": "MLP", "pp=2,tp=2": "MLP",
    "dp=2,shard=2": "GPT, tied", "shard=2,pp=2": "TransformerEncoder",
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(request, _fork_server):
    """So many ranks on two hosts."""
    with nbdist.Cluster(hosts=dict.fromkeys(("h1", "h2"), request.param // 2), device="cpu", spares=0) as started:
        yield started


def test_every_mesh_of_two_and_four_is_here():
    sizes = {mesh: matrix.Mesh.parse(mesh, matrix.ranks_of(mesh)).size for mesh in matrix.MESHES}
    assert set(MODELS) == {mesh for mesh, size in sizes.items() if size in (2, 4)}


@pytest.mark.parametrize(
    ("cluster", "mesh"), sorted((matrix.ranks_of(mesh), mesh) for mesh in MODELS), indirect=["cluster"]
)
def test_a_mesh_over_hosts_equals_one_process(cluster, mesh):
    """In float64 to 1e-10, with AdamW, one and three slices a rank, and a last, smaller batch."""
    case = matrix.CASES[MODELS[mesh]]
    data = case.data(matrix.BATCH * (matrix.STEPS - 1) + matrix.LAST, torch.float64)
    results = {}
    for accumulate in matrix.ACCUMULATE:
        model, plan = case.model(torch.float64), matrix.plan_for(mesh, accumulate)
        run = cluster.train(
            model, data, loss=case.loss, strategy=mesh, seed=matrix.SEED, optimizer=matrix.OPTIMIZERS["AdamW"],
            accumulate=accumulate, batch_size=matrix.BATCH, shuffle=False, microbatches=plan.microbatches, epochs=1,
            threads=1,
        )  # fmt: skip
        tensors = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        results["AdamW", accumulate] = run.history[-1]["loss"], tensors
    assert matrix.difference(MODELS[mesh], mesh, torch.float64, results) < matrix.EXACT
