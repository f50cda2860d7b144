"""On a GPU: the numbers of one process, whether a rank has it alone or several share it.

``make test-gpu`` runs this; without a GPU there is nothing to run. Ranks that share a GPU meet over gloo, so one GPU is
enough for all of it but nccl between several.
"""

from __future__ import annotations

import matrix
import pytest
import torch
from problems import ADAMW, assert_same_bits, classes, losses, mlp, seeded, train, weights
from test_matrix import PART
from torch import nn

from nbdist.core.comm import ProcessGroupChannel
from nbdist.core.comm.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("mesh", "model"), PART.items())
def test_a_mesh_equals_one_process(run_ranks, mesh, model):
    """In float64 to 1e-10, with ranks that share the GPU and a loop written by hand there."""
    results = run_ranks(matrix.ranks_of(mesh), matrix.run_cell, model, mesh, torch.float64, device="cuda")
    assert not isinstance(results[0], str), results[0]
    assert matrix.difference(model, mesh, torch.float64, results[0], "cuda") < matrix.EXACT


def test_what_a_gpu_trains_lies_on_the_cpu_afterwards():
    """A model moves to the GPU for the training, and back to its device."""
    model = mlp()
    train(World(device=GPU), model, classes(64), optimizer=ADAMW, epochs=1, batch_size=16)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    expected = mlp()
    train(World(), expected, classes(64), optimizer=ADAMW, epochs=1, batch_size=16)
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-12)


class OneRankNccl(World):
    """A rank alone whose channel is nccl's all the same: its streams, and buckets that start during backward."""

    def channel(self):
        return ProcessGroupChannel(self.device, streamed=True)


def large():
    return nn.Sequential(nn.Linear(6, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.Linear(2048, 3))


def over_nccl(world, given):
    """Losses and weights of a rank alone, without a channel and with that of nccl."""
    assert world.backend == "nccl"
    found = []
    for each in (world, OneRankNccl(device=world.device, backend="nccl")):
        model = seeded(large)
        result, trained = train(each, model, classes(240, torch.float32), bucket_mib=1.0, **given)
        found.append((losses(result), trained))
    return found


@pytest.mark.parametrize(
    "more", [{}, {"accumulate": 3}, {"clip_norm": 0.1}, {"precision": "fp16"}, {"stop_on_nan": True}]
)
def test_the_overlapping_sync_of_nccl_changes_no_bit(run_ranks, more):
    """Many buckets of large gradients: a step that did not wait for them would update with others."""
    given = {"optimizer": ADAMW, "epochs": 2, "batch_size": 48} | more
    [((expected_losses, expected), (found_losses, found))] = run_ranks(1, over_nccl, given, device="cuda")
    assert expected_losses == found_losses
    assert_same_bits(expected, found)
