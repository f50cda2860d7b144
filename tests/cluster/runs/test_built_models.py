"""A model that a callable builds is trained as the notebook's own, and no process needs memory for all of it."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from safetensors.torch import save_file
from tasks import copied
from torch import nn
from torch.nn import functional as F

from nbdist.cluster import last_run
from nbdist.errors import ClusterError, EngineError, TaskError

WIDTH = 256
DATA = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(32) % WIDTH
LARGE, LAYERS = 1024, 16
MIB = LARGE * LARGE * 4 * LAYERS / 2**20
OPTIONS = {"batch_size": 16, "steps": 3, "optimizer": "sgd", "lr": 0.1, "seed": 2}


def layers(count, width):
    torch.manual_seed(5)
    return nn.Sequential(*(layer for _ in range(count) for layer in (nn.Linear(width, width, bias=False), nn.Tanh())))


def build():
    return layers(4, WIDTH)


def build_large():
    return layers(LAYERS, LARGE)


def memory_mib():
    """Of this process, but for what is in files or shared."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def step(model, batch):
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    print(f"memory {memory_mib()}")
    return loss


@pytest.fixture
def weights(tmp_path):
    save_file({name: value.clone() for name, value in build().state_dict().items()}, tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("strategy", "from_file"), [("data", False), ("shard", False), ("shard", True), ("pipeline", True)]
)
def test_it_trains_to_the_bits_of_the_notebooks_own_model(cluster, weights, strategy, from_file):
    own = build()
    cluster.train(own, DATA, loss="cross_entropy", strategy=strategy, **OPTIONS)
    run = cluster.train(
        build, DATA, loss="cross_entropy", strategy=strategy, weights=weights if from_file else None, **OPTIONS
    )
    for name, value in copied(own).items():
        assert torch.equal(value, copied(run.model)[name]), name
    predicted = cluster.predict(run.model, DATA[0], batch_size=16)
    torch.testing.assert_close(predicted, own(DATA[0]).detach())


@pytest.mark.parametrize("strategy", ["shard", "pipeline"])
def test_no_process_needs_memory_for_the_model(cluster, strategy):
    """Each rank has its half and, after the first backward, its gradients; the kernel has nothing."""
    given = {"step": step, "strategy": strategy, "check": "no", **OPTIONS}
    cluster.train(build, DATA, **given)  # what is loaded once is loaded
    gc.collect()
    before, (x, y) = memory_mib(), DATA
    run = cluster.train(build_large, (x.repeat(1, LARGE // WIDTH), y), **given)
    gc.collect()
    assert memory_mib() - before < MIB / 4
    assert sum(parameter.nbytes for parameter in run.model.parameters()) / 2**20 == MIB
    for text in run.printed().values():
        seen = [float(line.split()[1]) for line in text.splitlines() if line.startswith("memory")]
        if seen:  # the last rank of a pipeline computes the loss
            assert max(seen) - min(seen) < MIB * 0.9


def test_run_model_is_there_at_the_end_of_such_a_run(cluster):
    run = cluster.train(build, DATA, loss="cross_entropy", **OPTIONS | {"steps": 10**9}, background=True)
    with pytest.raises(ClusterError, match=r"run .* has not ended: run.model is the model that a callable has built"):
        _ = run.model
    run.stop()
    run.wait()
    assert isinstance(run.model, nn.Sequential)
    run = cluster.train(nn.Linear(WIDTH, 3), (DATA[0], DATA[1] % 3), loss="cross_entropy", **OPTIONS)
    with pytest.raises(ClusterError, match=r"run .* trains model itself: run.model"):
        _ = run.model


def test_it_is_trained_on(cluster):
    """As `run.model`, by --resume alone; a prediction with the run is of that model."""
    options = OPTIONS | {"loss": "cross_entropy", "strategy": "shard"}
    own = build()
    cluster.train(own, DATA, **options)
    cluster.train(own, DATA, **options)
    run = cluster.train(build, DATA, **options)
    again = cluster.train(run.model, DATA, **options)
    assert again.model is run.model
    assert torch.equal(again.model[0].weight, own[0].weight)
    torch.testing.assert_close(again.predict(DATA[0]), own(DATA[0]).detach())
    cluster.train(build, DATA, **options)
    resumed = cluster.resume(steps=6)
    plain = build()
    cluster.train(plain, DATA, **options | {"steps": 6})
    assert torch.equal(resumed.model[0].weight, plain[0].weight)


def test_small_weights_from_a_file_are_trained_on(cluster, tmp_path):
    """Those that stay in ordinary memory, too."""

    def small():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))

    save_file({name: value.clone() for name, value in small().state_dict().items()}, tmp_path / "s.safetensors")
    options = {"loss": "mse", "batch_size": 16, "steps": 5, "optimizer": "sgd", "lr": 0.1, "strategy": "shard"}
    run = cluster.train(small, (DATA[0], DATA[0][:, :2]), weights=str(tmp_path / "s.safetensors"), **options)
    with torch.no_grad():
        torch.testing.assert_close(cluster.predict(run.model, DATA[0]), run.model(DATA[0]))


def test_a_failed_run_leaves_the_model_as_it_was_built(cluster, weights):
    def fails(model, batch):
        raise ValueError("no such thing")

    with pytest.raises(EngineError, match="no such thing"):
        cluster.train(build, DATA, step=fails, weights=weights, **OPTIONS)
    model = last_run().model
    assert torch.equal(model[0].weight, build()[0].weight)
    with torch.no_grad():
        model[0].weight.zero_()
    cluster.train(model, DATA, loss="cross_entropy", **OPTIONS)
    own = build()
    nn.init.zeros_(own[0].weight)
    cluster.train(own, DATA, loss="cross_entropy", **OPTIONS)
    assert torch.equal(model[2].weight, own[2].weight)


def test_why_it_cannot_be_built_is_reported_before_an_engine_is_touched(cluster):
    before = last_run()
    with pytest.raises(TaskError, match=r"model\(\) raised ValueError: no such configuration"):
        cluster.train(_refuses, DATA, loss="mse")
    assert last_run() is before


def _refuses():
    raise ValueError("no such configuration")
