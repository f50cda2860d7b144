"""Scaling: engines join and leave between runs, during one, and after losses."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import torch
from gate import Gate
from shared_cluster import ENGINES, gone, until
from torch import nn

import nbdist
from nbdist.cluster.runs.replan import replan
from nbdist.errors import ClusterError, EngineError, PlanError

STEPS = 40
OPTIONS = {"loss": "mse", "epochs": 2, "batch_size": 48, "seed": 3}


@pytest.fixture
def scaled(cluster):
    """The running cluster, which has its two engines again afterwards."""
    yield cluster
    if cluster.size != ENGINES:
        cluster.scale(ENGINES)


def make():
    """In float64, in which sums over other numbers of ranks are the same to 1e-12."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def rows():
    x = torch.randn(960, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, x.sum(1, keepdim=True).sin()


@pytest.fixture(scope="module")
def undisturbed(shared_cluster):
    model = make()
    run = shared_cluster.ready().train(model, rows(), **OPTIONS)
    return model, run.history


def check(model, run, undisturbed):
    """The weights and the history of an undisturbed run, up to the order of summation."""
    same, history = undisturbed
    for mine, theirs in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert [row["samples"] for row in history] == [row["samples"] for row in run.history]
    assert [row["loss"] for row in run.history] == pytest.approx([row["loss"] for row in history], abs=1e-12)
    assert (run.state, run.progress.step) == ("finished", STEPS)


def scale(cluster, gate, step, run, size):
    """Scale while all ranks are held after a step, and wait until the engines are there."""
    gate.wait(step, ranks=cluster.size, run=run)
    cluster.scale(size)
    gate.open(step)
    until(lambda: cluster.size == size)


def test_between_runs_the_other_engines_keep_their_state(scaled):
    """A new engine has every cell and value that all ranks have; one that leaves is gone."""
    scaled.push(given=7)
    scaled.execute("held = [rank, world_size]").wait()
    scaled.execute("alone = 1", [0]).wait()
    before = [engine.pid for engine in scaled.engines]
    scaled.scale(3)
    assert [engine.pid for engine in scaled.engines][:2] == before
    assert [scaled.pull("held", rank) for rank in range(3)] == [[0, 2], [1, 2], [2, 3]]
    assert (scaled.pull("given", 2), scaled.pull("world_size", 0)) == (7, 3)
    with pytest.raises(ClusterError, match="'alone' is not defined on rank 2"):
        scaled.pull("alone", 2)
    left = psutil.Process(scaled.engines[2].pid)
    scaled.scale(1)
    assert gone([left])
    assert (scaled.size, [engine.pid for engine in scaled.engines]) == (1, before[:1])


def test_a_run_scales_up_and_down(scaled, undisturbed, tmp_path):
    """After a step, with the same global batch: the result is that of an undisturbed run."""
    model, gate = make(), Gate(tmp_path, 5, 15, 25)
    run = scaled.train(model, rows(), background=True, lr_scheduler=gate, **OPTIONS)
    for step, size in ((5, 3), (15, 1), (25, 2)):
        scale(scaled, gate, step, run, size)
    run.wait()
    check(model, run, undisturbed)
    assert ["3 instead of 2 engines", "1 instead of 3 engines", "2 instead of 1 engines"] == [
        note.partition(";")[0] for note in run.progress.notes
    ]
    (past,) = nbdist.past_runs()
    assert ({0, 1}, STEPS) == (set(past.progress.ranks), past.progress.step)


def carrying(model, batch):
    """Adds to the loss what the slice has seen in the batch before."""
    state = nbdist.carried(before=0.0)
    scores = model(batch[0])
    loss = (scores - batch[1] - 0.1 * state.before).square().mean()
    state.before = scores.detach().mean()
    return loss


@pytest.mark.programs
def test_what_a_step_carries_goes_with_its_slice_to_another_rank(scaled, tmp_path):
    """With as many slices the weights are those without scaling; without, scaling is refused, and the run goes on."""
    options = {**OPTIONS, "loss": None, "step": carrying, "shuffle": False, "check": "mesh"}
    still, model, gate = make(), make(), Gate(tmp_path, 5, 15)
    scaled.train(still, rows(), reproducible=4, **options)
    run = scaled.train(model, rows(), background=True, reproducible=4, lr_scheduler=gate, **options)
    for step, size in ((5, 3), (15, 2)):
        scale(scaled, gate, step, run, size)
    run.wait()
    torch.testing.assert_close(model.state_dict(), still.state_dict(), rtol=0, atol=0)

    gate = Gate(tmp_path, 7)
    run = scaled.train(make(), rows(), background=True, lr_scheduler=gate, **options)
    gate.wait(7, ranks=2, run=run)
    with pytest.raises(PlanError, match=r"of 2 slices, and on 3 ranks a batch has 3: begin with --reproducible"):
        scaled.scale(3)
    gate.open(7)
    assert ("finished", 2) == (run.wait().state, scaled.size)


@pytest.mark.parametrize("strategy", ["shard", "dp=2"])
def test_a_run_scales_on_other_meshes(scaled, undisturbed, tmp_path, strategy):
    """A strategy name puts all ranks on its axis; in an explicit mesh only dp changes."""
    model, gate = make(), Gate(tmp_path, 5)
    run = scaled.train(model, rows(), background=True, strategy=strategy, lr_scheduler=gate, **OPTIONS)
    scale(scaled, gate, 5, run, 3)
    run.wait()
    check(model, run, undisturbed)
    assert str(run.plan.mesh) == ("shard=3" if strategy == "shard" else "dp=3")


@pytest.mark.programs
def test_with_reproducible_scaling_changes_no_bit(scaled, tmp_path):
    """From 2 to 3, 1 and 4 engines in mid-run, and one killed: weights and history are those of one process."""
    options = {**OPTIONS, "reproducible": True}
    alone, model, gate = make().float(), make().float(), Gate(tmp_path, 5, 13, 21, 29)
    x, y = (tensor.float() for tensor in rows())
    expected = nbdist.train(alone, (x, y), verbose=False, device="cpu", **options)
    run = scaled.train(model, (x, y), background=True, lr_scheduler=gate, **options)
    for step, size in ((5, 3), (13, 1), (21, 4)):
        scale(scaled, gate, step, run, size)
    gate.wait(29, ranks=4, run=run)
    os.kill(scaled.engines[1].pid, signal.SIGKILL)
    gate.open(29)
    run.wait()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [row["loss"] for row in expected.history] == [row["loss"] for row in run.history]


def test_a_scale_after_the_last_step_happens_at_the_end(scaled, tmp_path):
    """During the last evaluation: the run ends unchanged, and then the engines are there."""
    gate = Gate(tmp_path)

    def measured(output, target):
        gate.hold("evaluation")
        return (output - target).abs().mean()

    run = scaled.train(make(), rows(), val=rows(), metric=measured, background=True, **{**OPTIONS, "epochs": 1})
    gate.wait("evaluation", ranks=1, run=run)  # rank 0 alone computes it
    scaled.scale(3)
    gate.open("evaluation")
    run.wait()
    assert (run.state, run.progress.step, scaled.size, len(scaled.engines)) == ("finished", 20, 3, 3)
    model = make()
    assert "finished" == scaled.train(model, rows(), **OPTIONS).state


def test_a_rank_may_die_while_the_others_wait_for_new_ones(scaled, undisturbed, tmp_path):
    """It is replaced, and the run continues on the wanted number."""
    model, gate = make(), Gate(tmp_path, 5, 15)
    run = scaled.train(model, rows(), background=True, lr_scheduler=gate, **OPTIONS)
    gate.wait(5, run=run)
    scaled.scale(3)
    gate.open(5)
    os.kill(scaled.engines[1].pid, signal.SIGKILL)
    gate.open(15)  # until here it cannot have ended
    run.wait()
    check(model, run, undisturbed)
    assert scaled.size == 3


def test_a_run_may_shrink_to_the_engines_left(scaled, undisturbed, tmp_path):
    """With on_failure="shrink" a lost engine is not replaced."""
    model, gate = make(), Gate(tmp_path, 5)
    run = scaled.train(model, rows(), background=True, on_failure="shrink", lr_scheduler=gate, **OPTIONS)
    gate.wait(5, run=run)
    os.kill(scaled.engines[0].pid, signal.SIGKILL)
    gate.open(5)
    run.wait()
    check(model, run, undisturbed)
    assert (scaled.size, len(run.progress.ranks)) == (1, 1)
    assert "rank 0 lost (its process ended), 1 instead of 2 engines" in run.progress.notes[-1]


def test_a_run_may_stop_when_an_engine_is_lost(scaled, undisturbed, tmp_path):
    """With on_failure="stop"; the model holds the last snapshot, and resume continues from it."""
    model, gate = make(), Gate(tmp_path, 30)
    run = scaled.train(model, rows(), background=True, on_failure="stop", lr_scheduler=gate, **OPTIONS)
    gate.wait(30, run=run)
    os.kill(scaled.engines[1].pid, signal.SIGKILL)
    gate.open(30)
    with pytest.raises(EngineError, match=r"rank 1.*its process ended(.|\n)*The model holds the weights after step"):
        run.wait()
    assert run.state == "failed"
    check(model, scaled.resume(on_failure="replace"), undisturbed)


def test_a_queued_run_starts_on_the_engines_of_that_moment(scaled, undisturbed, tmp_path):
    """Its plan is made again for them."""
    first, second, gate = make(), make(), Gate(tmp_path, 5)
    run = scaled.train(first, rows(), background=True, lr_scheduler=gate, **OPTIONS)
    waiting = scaled.train(second, rows(), background=True, **OPTIONS)
    scale(scaled, gate, 5, run, 3)
    waiting.wait()
    check(first, run, undisturbed)
    check(second, waiting, undisturbed)
    assert (str(waiting.plan.mesh), len(waiting.progress.ranks)) == ("dp=3", 3)


def test_an_impossible_scale_is_refused_and_the_run_continues(scaled, undisturbed, tmp_path):
    """By the mesh, the batch or the machine: raised before anything changes."""
    model, gate = make(), Gate(tmp_path, 5)
    with pytest.raises(PlanError, match=r"unknown on_failure 'shrnk': use replace, shrink, stop. Did you mean"):
        scaled.train(model, rows(), on_failure="shrnk", **OPTIONS)
    run = scaled.train(model, rows(), background=True, strategy="shard=2", lr_scheduler=gate, **OPTIONS)
    gate.wait(5, run=run)
    with pytest.raises(PlanError, match="shard=2 cannot use 3 engines: only dp changes, so use a multiple of 2"):
        scaled.scale(3)
    with pytest.raises(PlanError, match="0"):
        scaled.scale(0)
    with pytest.raises(PlanError, match="engines must be a whole number, not '2'"):
        scaled.scale("2")
    gate.open(5)
    run.wait()
    check(model, run, undisturbed)


def test_a_plan_for_other_numbers_of_ranks():
    """Strategy names and meshes, and a batch that is too small for so many."""
    assert str(replan({"batch_size": 8}, 3, cores=2).mesh) == "dp=3"
    assert str(replan({"batch_size": 8, "strategy": "pipeline"}, 2, cores=2).mesh) == "pp=2"
    assert str(replan({"batch_size": 8, "strategy": "dp=2, pp=2"}, 6, cores=2).mesh) == "dp=3,pp=2"
    with pytest.raises(PlanError, match="batch_size 8 is smaller than its 9 slices"):
        replan({"batch_size": 8}, 9, cores=2)
