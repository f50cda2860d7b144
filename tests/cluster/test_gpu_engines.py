"""Engines on a GPU, which they share: what they train, keep and give back, and that nothing that happens changes a bit.

``make test-gpu`` runs this; without a GPU there is nothing to run.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
from shared_cluster import until
from tasks import copied, same
from torch import nn

import nbdist
from nbdist import Cluster
from nbdist.errors import EngineError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:several ranks share a GPU"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda", 0)
IMAGES = {"loss": "cross_entropy", "epochs": 3, "batch_size": 24, "lr": 0.01, "seed": 5}


def net():
    """Convolution, BatchNorm and dropout, which have GPU kernels of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(512, 5),
        )


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(240, 3, 8, 8, generator=generator), torch.randint(5, (240,), generator=generator)


@pytest.fixture(scope="module")
def sharing(shared_cluster):
    """Two engines on one GPU."""
    shared_cluster.stop()
    with Cluster(2, device="cuda") as cluster:
        yield cluster


@pytest.fixture
def two(sharing):
    """The same two engines, alive and idle."""
    sharing.start()
    if sharing.size != 2:
        sharing.scale(2)
    return sharing


def test_by_default_there_is_an_engine_a_gpu(shared_cluster):
    """Each has its own, without a warning about sharing."""
    shared_cluster.stop()
    with Cluster() as cluster:
        assert [f"cuda:{rank}" for rank in range(torch.cuda.device_count())] == [e.device for e in cluster.engines]
        model, alone = net(), net()
        cluster.train(model, images(), **IMAGES, reproducible=True)
        nbdist.train(alone, images(), **IMAGES, reproducible=True, verbose=False)
        assert same(model, copied(alone))


def test_ranks_that_share_a_gpu_warn(shared_cluster):
    """They use gloo."""
    shared_cluster.stop()
    with pytest.warns(UserWarning, match="several ranks share a GPU"):
        cluster = Cluster(2, device="cuda").start()
    with cluster:
        assert ["cuda:0", "cuda:0"] == [engine.device for engine in cluster.engines]
        assert "gloo" == cluster.transport


@pytest.fixture(scope="module")
def reproducible():
    """What one rank trains, with slices."""
    model = net()
    history = nbdist.train(model, images(), **IMAGES, reproducible=True, verbose=False).history
    return copied(model), [row["loss"] for row in history]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_bit_depends_on_the_number_of_ranks(two, reproducible, size):
    """Convolutions, BatchNorm and dropout included; ranks join between runs."""
    two.scale(size)
    model = net()
    run = two.train(model, images(), **IMAGES, reproducible=True)
    assert same(model, reproducible[0])
    assert [row["loss"] for row in run.history] == reproducible[1]


def test_ranks_join_and_die_in_the_middle_of_a_run(two):
    """With the bits of one undisturbed rank."""
    options = {**IMAGES, "epochs": 20, "reproducible": True}
    expected, model = net(), net()
    nbdist.train(expected, images(), **options, verbose=False)
    run = two.train(model, images(), **options, background=True)
    until(lambda: run.progress.step > 20)
    two.scale(3)
    until(lambda: two.size == 3 and run.progress.step > 60)
    os.kill(two.engines[1].pid, signal.SIGKILL)
    run.wait(60)
    assert run.state == "finished"
    assert same(model, copied(expected))


def test_a_stopped_run_resumes(two):
    """With the GPU's random numbers too."""
    options = {**IMAGES, "epochs": 60}
    expected, model = net(), net()
    two.train(expected, images(), **options)
    run = two.train(model, images(), **options, background=True)
    until(lambda: run.progress.step > 20)
    run.stop()
    run.wait(30)
    assert run.state == "stopped"
    two.resume()
    torch.testing.assert_close(copied(model), copied(expected), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_resumes_without_a_gpu(two, tmp_path):
    """And an ordinary model reads it."""
    model, read = net(), net()
    two.train(model, images(), **IMAGES, checkpoint=str(tmp_path / "run"))
    nbdist.load_checkpoint(tmp_path / "run", read)
    assert same(read, copied(model))
    again = net()
    more = {**IMAGES, "epochs": 4}
    result = nbdist.train(again, images(), **more, resume=str(tmp_path / "run"), device="cpu", verbose=False)
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision(two, precision):
    """It learns about as in full precision."""
    found = [two.train(net(), images(), **IMAGES, precision=each).history[-1]["loss"] for each in ("full", precision)]
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_a_model_on_the_gpu_stays_there(two):
    """The notebook's own, trained in place; and values go there and back."""
    model, expected = net().to(GPU), net()
    two.train(model, images(), **IMAGES)
    two.train(expected, images(), **IMAGES)
    assert {parameter.device for parameter in model.parameters()} == {GPU}
    torch.testing.assert_close(copied(model.cpu()), copied(expected), rtol=1e-4, atol=1e-5)
    two.push(there=torch.arange(3, device=GPU))
    two.execute("back = there.to(device) * (rank + 1)").wait()
    assert [0, 2, 4] == two.pull("back", 1).tolist()


def held(cluster):
    """How many bytes of GPU memory each rank reserves."""
    cluster.execute("import torch; held = torch.cuda.memory_reserved()").wait()
    return [cluster.pull("held", rank) for rank in range(cluster.size)]


def greedy(model, batch):
    """A step that needs more memory than any GPU has."""
    return model(batch[0]).mean() * torch.ones(2**40, device=batch[0].device).mean()


def test_a_run_out_of_memory_frees_all_of_it(two):
    """For other processes too; and the next run works."""
    two.train(net(), images(), **IMAGES)
    before = held(two)
    large = nn.Sequential(nn.Flatten(), nn.Linear(192, 200_000), nn.Linear(200_000, 5))
    with pytest.raises(EngineError, match="out of memory"):
        two.train(large, images(), step=greedy, batch_size=24, epochs=1)
    assert held(two) == before
    assert two.train(net(), images(), **IMAGES).state == "finished"
