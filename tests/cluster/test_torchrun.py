"""Promise: the same training under torchrun, with the same bits."""

from __future__ import annotations

import subprocess
import sys

import torch
from tasks import copied

SETUP = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3))
data = torch.randn(250, 6), torch.randint(3, (250,))
options = dict(
    loss="cross_entropy", optimizer="adamw", lr=0.01, epochs=2, batch_size=64, accumulate=2, clip_norm=0.5, seed=5
)
"""
SCRIPT = (
    SETUP
    + """
import nbdist, os, sys

nbdist.train(model, data, **options)
torch.save(model.state_dict(), f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""
)


def test_a_cluster_and_torchrun_give_the_same_bits(cluster, tmp_path):
    """The same model, data and options through the engines and through a script on two ranks: equal weight bytes."""
    (tmp_path / "train.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, tmp_path / "train.py", tmp_path], check=True, capture_output=True, timeout=100)

    notebook = {}
    with torch.random.fork_rng():
        exec(SETUP, notebook)
    before = copied(notebook["model"])
    cluster.train(notebook["model"], notebook["data"], **notebook["options"])
    trained = {name: tensor.numpy().tobytes() for name, tensor in notebook["model"].state_dict().items()}
    assert all(trained[name] != tensor.numpy().tobytes() for name, tensor in before.items())
    for rank in range(2):
        under_torchrun = torch.load(tmp_path / f"{rank}.pt")
        assert {name: tensor.numpy().tobytes() for name, tensor in under_torchrun.items()} == trained
