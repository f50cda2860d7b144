"""A run of two modules with an optimizer each resumes from any step, on any ranks, as one of a single model does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import assert_same_bits, seeded, stop_after, train_task
from torch import nn
from torch.nn import functional as F
from two_modules import EPOCHS, by_hand, pair, state_of, task_of

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.restore import load_whole
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.task.modules import Modules
from nbdist.errors import PeerLostError, TaskError

EXACT = {"rtol": 0, "atol": 1e-10}
CUT = {"split_at": ("head.0",)}  # by default a pipeline is cut by measured times, which differ from run to run


def task_to_keep(dropout=0.3):
    return replace(task_of(pair(dropout)), own_optimizers=True)


def undisturbed_and_resumed(world, mesh, paths, folder, options):
    """The state after a run, and after one that was stopped in its second epoch and resumed, from memory or disk."""
    options = {"strategy": mesh, "epochs": EPOCHS, **options}
    first = {"snapshot_paths": paths} if folder is None else {"checkpoint": folder}
    then = {"snapshot_paths": paths, "from_snapshot": True} if folder is None else {"resume": folder}
    states = []
    for more in ({}, {"commands": stop_after(4), **first}, then):
        task = task_to_keep()
        train_task(world, task, **options, **more)
        states.append(state_of(task))
    assert states[1]["body"] != states[0]["body"]
    return states[0], states[2]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    ("mesh", "options"), [("dp=2", {}), ("shard=2", {}), ("tp=2", {}), ("pp=2", CUT), ("shard=2,pp=2", CUT)]
)
def test_a_stop_changes_no_bit(run_ranks, tmp_path, mesh, options, where):
    """Of weights, both optimizers' state and rates, and what their schedulers do next."""
    size = math.prod(int(part[-1]) for part in mesh.split(","))
    store = SnapshotStore(size)
    folder = str(tmp_path) if where == "disk" else None
    outcomes = run_ranks(size, undisturbed_and_resumed, mesh, store.paths, folder, options)
    assert_same_bits(*outcomes[0])
    store.close()


def run_to(world, stop, options):
    task = task_to_keep()
    train_task(world, task, epochs=EPOCHS, reproducible=4, commands=stop_after(stop), **options)
    return state_of(task)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_reproducible_run_goes_on_with_other_ranks(run_ranks, tmp_path, ranks):
    """With the bits of an undisturbed one."""
    expected = run_ranks(2, run_to, 99, {})[0]
    run_ranks(2, run_to, 4, {"checkpoint": str(tmp_path)})
    assert_same_bits(expected, run_ranks(ranks, run_to, 99, {"resume": str(tmp_path)})[0])


def first_part(world, mesh, folder):
    task = task_to_keep(0.0)
    train_task(world, task, strategy=mesh, epochs=EPOCHS - 1, checkpoint=folder)
    return state_of(task)


def last_part(world, mesh, folder):
    task = task_to_keep(0.0)
    train_task(world, task, strategy=mesh, epochs=EPOCHS, resume=folder)
    return state_of(task)


@pytest.mark.parametrize(("kept", "then"), [("shard=2,pp=2", "tp=2"), ("tp=2", "shard=2"), ("dp=2", "pp=2")])
def test_on_another_mesh(run_ranks, tmp_path, kept, then):
    """The bits of the kept state, and in the end the results of a plain loop."""
    size = math.prod(int(part[-1]) for part in kept.split(","))
    expected = run_ranks(size, first_part, kept, str(tmp_path))[0]
    whole = task_to_keep(0.0)
    load_whole(CheckpointReader.in_folder(str(tmp_path)), whole.model, whole.optimizers)
    assert_same_bits(expected, state_of(whole))
    torch.testing.assert_close(run_ranks(2, last_part, then, str(tmp_path))[0], by_hand(), **EXACT)


def test_other_optimizers_are_refused(tmp_path):
    """Before anything changes; both sides are named."""
    train_task(World(), task_of(pair()), steps=2, checkpoint=str(tmp_path))
    task = task_of(pair())
    before = state_of(task)
    of = r"is of the optimizers body, head, not of"
    with pytest.raises(TaskError, match=f"{of} the optimizers body: give optimizers of the same names"):
        train_task(World(), replace(task, optimizers={"body": task.optimizers["body"]}, schedulers={}), steps=4,
                   resume=str(tmp_path))  # fmt: skip
    with pytest.raises(TaskError, match=f"{of} one optimizer: give optimizers"):
        nbdist.load_checkpoint(str(tmp_path), task.model, task.optimizers["head"])
    assert_same_bits(before, state_of(task))
    nbdist.load_checkpoint(str(tmp_path), task.model)
    assert not torch.equal(before["body.0.weight"], task.model.state_dict()["body.0.weight"])


def normed():
    """Both modules have running statistics, so a failed forward changes those of the first."""
    return {
        "body": seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), torch.float64),
        "head": seeded(lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.float64),
    }


def plain_step(modules, batch):
    return F.cross_entropy(modules["head"](modules["body"](batch[0])), batch[1])


def task_of_normed(changed=plain_step):
    modules = normed()
    return replace(task_of(modules), model=Modules(modules, changed))


def fail(world, where, paths):
    """Fail in the fifth step on the last rank: between the modules, or between the optimizers."""
    calls = []

    def failing(*_):
        calls.append(1)
        if len(calls) == 5 and world.rank == world.size - 1:
            raise ZeroDivisionError(where)

    def changed(modules, batch):
        hidden = modules["body"](batch[0])
        failing()
        return F.cross_entropy(modules["head"](hidden), batch[1])

    task = task_of_normed(changed if where == "forward" else plain_step)
    if where == "update":
        task.optimizers["head"].register_step_pre_hook(failing)
    try:
        train_task(world, task, epochs=EPOCHS, snapshot_paths=paths, strategy="data")
    except (ZeroDivisionError, PeerLostError) as error:
        return type(error).__name__


def stopped(world, at, paths):
    train_task(world, task_of_normed(), epochs=EPOCHS, snapshot_paths=paths, strategy="data", commands=stop_after(at))


def loaded(paths):
    task = task_of_normed()
    saved = CheckpointReader.of_snapshot(paths)
    load_whole(saved, task.model, task.optimizers)
    return saved.step, state_of(task)


@pytest.mark.parametrize("where", ["forward", "update"])
def test_an_error_leaves_no_half_of_a_step(run_ranks, where):
    """With one module run, or one optimizer stepped, the state of a whole step is kept."""
    store, other = SnapshotStore(2), SnapshotStore(2)
    assert "ZeroDivisionError" == run_ranks(2, fail, where, store.paths)[-1]
    at, state = loaded(store.paths)
    assert at == 4 if where == "forward" else 1 <= at <= 4
    run_ranks(2, stopped, at, other.paths)
    assert_same_bits(loaded(other.paths)[1], state)
    store.close()
    other.close()
