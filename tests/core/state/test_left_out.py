"""Checkpoints without the parameters that are not trained: of adapters on a large model, say."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from problems import ADAMW, classes, seeded, train_task
from torch import nn

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.shard_plan import bit_sum
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

DATA = classes(64)


class Adapted(nn.Module):
    """A frozen network, with an adapter beside each layer, as peft makes them."""

    def __init__(self):
        super().__init__()
        self.base = nn.ModuleList([nn.Linear(6, 256), nn.Linear(256, 4)]).requires_grad_(False)
        self.down = nn.ModuleList([nn.Linear(6, 2, bias=False), nn.Linear(256, 2, bias=False)])
        self.up = nn.ModuleList([nn.Linear(2, 256, bias=False), nn.Linear(2, 4, bias=False)])
        self.peft_config = {"default": None}

    def forward(self, x):
        for number, layer in enumerate(self.base):
            x = layer(x.tanh()) + self.up[number](self.down[number](x.tanh()))
        return x


def run(world, seed, options):
    model = seeded(Adapted, torch.float64)
    if seed:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            nn.init.normal_(model.base[0].weight)
    given = {"loss": "cross_entropy", "optimizer": ADAMW, "batch_size": 8, **options}
    task, plan_options = Task.of_options(model, DATA, given)
    train_task(world, task, **{k: v for k, v in plan_options.items() if k not in task.options})
    return model.state_dict()


@pytest.fixture
def run_on(run_ranks):
    """Trains on a mesh; returns each rank's weights."""

    def on(mesh, seed=0, **options):
        size = math.prod(map(int, re.findall(r"\d", mesh)))
        return run_ranks(size, run, seed, {"strategy": mesh, **options})

    return on


def bytes_in(folder):
    """Those of the newest checkpoint."""
    return sum(file.stat().st_size for file in sorted(Path(folder).glob("*-step*"))[-1].glob("*.safetensors"))


@pytest.mark.parametrize(
    ("first", "second"), [("dp=2", "dp=1"), ("shard=2", "dp=2"), ("dp=1", "shard=2"), ("pp=2", "dp=1")]
)
def test_a_resume_takes_them_from_the_model(run_on, tmp_path, first, second):
    """From any mesh onto any mesh: the weights of a run that was never interrupted."""
    (expected, *_) = run_on("dp=1", steps=6)
    run_on(first, steps=3, checkpoint=str(tmp_path))
    saved = CheckpointReader.in_folder(str(tmp_path))
    assert {"base.0.weight", "base.0.bias", "base.1.weight", "base.1.bias"} == set(saved.left_out)
    assert not any(name.startswith("base") for name in saved.names)
    for trained in run_on(second, steps=6, resume=str(tmp_path)):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-10)


def test_other_values_are_refused_before_an_engine_is_touched(run_on, tmp_path):
    """By the sum of their bits."""
    run_on("shard=2", steps=2, checkpoint=str(tmp_path))
    model = seeded(Adapted, torch.float64)
    with torch.no_grad():
        model.base[0].weight[3, 2] += 1e-9
    with pytest.raises(TaskError, match=r"leaves out base\.0\.weight, which is not trained, and the model has other"):
        nbdist.train(model, DATA, loss="cross_entropy", optimizer=ADAMW, steps=4, resume=str(tmp_path), verbose=False)
    with pytest.raises(TaskError, match=r"leaves out base\.0\.weight"):
        nbdist.load_checkpoint(str(tmp_path), model)


def test_the_option_counts(tmp_path):
    """For a model that is not peft's, and for one that is."""
    model, sizes = seeded(Adapted, torch.float64), []
    del model.peft_config
    for given in (None, False, True):
        folder = tmp_path / str(given)
        nbdist.train(
            model, DATA, loss="cross_entropy", optimizer=ADAMW, steps=2, checkpoint=str(folder), verbose=False,
            checkpoint_frozen=given,
        )  # fmt: skip
        sizes.append(bytes_in(folder))
    assert sizes[0] == sizes[2]
    assert sizes[0] - sizes[1] > sum(p.nbytes for p in model.base.parameters())


def test_a_teacher_that_a_step_writes_is_saved_all_the_same(run_on, tmp_path):
    """It takes no gradient, and changes."""

    def step(model, batch):
        with torch.no_grad():
            model.base[1].bias.lerp_(model.up[1].weight.mean(1), 0.1)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    model = seeded(Adapted, torch.float64)
    options = {"step": step, "optimizer": ADAMW, "batch_size": 8, "verbose": False, "check": "no"}
    nbdist.train(model, DATA, steps=3, checkpoint=str(tmp_path), **options)
    assert {} == CheckpointReader.in_folder(str(tmp_path)).left_out
    again = seeded(Adapted, torch.float64)
    nbdist.load_checkpoint(str(tmp_path), again)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_the_sum_of_parts_is_the_sum_of_the_whole(dtype):
    """Padded with zeros, as parts of a shard are."""
    whole = (torch.randn(7, 3) * 5).to(dtype)
    parts = torch.cat([whole.reshape(-1), torch.zeros(3, dtype=dtype)]).split(8)
    assert bit_sum(whole) == sum(map(bit_sum, parts)) % 2**64


def test_only_what_was_trained_comes_back_to_the_notebook(cluster, monkeypatch):
    """Frozen parameters stay the notebook's own, unread."""
    model = seeded(Adapted, torch.float64)
    before = [p.data_ptr() for p in model.base.parameters()], [p._version for p in model.base.parameters()]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cluster.train(model, DATA, loss="cross_entropy", optimizer=ADAMW, batch_size=8, steps=3)
    assert before == ([p.data_ptr() for p in model.base.parameters()], [p._version for p in model.base.parameters()])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {"down.0.weight", "down.1.weight", "up.0.weight", "up.1.weight"} == changed


def test_alone_in_this_process():
    """As under torchrun with one rank."""
    assert run(World(), 0, {"steps": 1}).keys() == Adapted().state_dict().keys()
