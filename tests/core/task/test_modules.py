"""Several modules and optimizers in one task: the results of a plain loop, on every mesh."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import classes, train_task
from torch import nn
from torch.nn import functional as F
from two_modules import BATCH, EPOCHS, by_hand, pair, state_of, step, task_of

import nbdist
from nbdist.core.comm.world import World
from nbdist.core.strategies.mesh_parallel import estimate
from nbdist.core.task.modules import Modules
from nbdist.core.transfer.payload import pack, unpack
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan

EXACT = {"rtol": 0, "atol": 1e-10}
MESHES = [
    ("dp=1", {}), ("dp=1", {"accumulate": 3}), ("dp=2", {"accumulate": 2}), ("dp=2", {"reproducible": 4}),
    ("dp=2", {"clip_norm": 0.1}), ("shard=2", {"clip_norm": 0.1}), ("tp=2", {"clip_norm": 0.1}),
    ("pp=2", {"clip_norm": 0.1}), ("dp=2,shard=2", {}), ("shard=2,pp=2", {}), ("pp=2,tp=2", {}),
]  # fmt: skip


def ranks_of(mesh):
    return math.prod(int(part[-1]) for part in mesh.split(","))


def trained(world, mesh, options):
    task = replace(task_of(pair()), own_optimizers=True)
    train_task(world, task, strategy=mesh, epochs=EPOCHS, **options)
    return state_of(task)


@pytest.mark.parametrize(("mesh", "options"), MESHES)
def test_parity_with_a_plain_loop(run_ranks, mesh, options):
    """Weights, state of both optimizers and their rates."""
    expected = by_hand(options.get("clip_norm"))
    state = run_ranks(ranks_of(mesh), trained, mesh, options)[0]
    torch.testing.assert_close(state, expected, **EXACT)


def named_optimizers(world):
    task = task_of(pair())
    train_task(world, task, strategy="data", epochs=EPOCHS)
    return state_of(task)


def test_where_ranks_share_the_weights(run_ranks):
    """Each rank holds the state of the parameters that it updates."""
    expected = by_hand()
    for state in run_ranks(2, named_optimizers, channel="shared weights"):
        assert len(state) < len(expected)
        torch.testing.assert_close(state, {name: expected[name] for name in state}, **EXACT)


def noisy(modules, batch):
    """Draws numbers, as the step of a GAN does."""
    x, y = batch
    hidden = modules["body"](x)
    return F.cross_entropy(modules["head"](hidden + torch.randn_like(hidden)), y)


def trained_with_noise(world, mesh, options):
    task = task_of(pair())
    train_task(world, replace(task, model=Modules(task.given, noisy)), strategy=mesh, epochs=EPOCHS, **options)
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


@pytest.mark.parametrize("mesh", ["shard=2", "tp=2", "pp=2"])
def test_a_step_draws_the_same_numbers_on_every_mesh(run_ranks, mesh):
    """Those of one process that runs the same slices."""
    options = {"microbatches": 2} if mesh == "pp=2" else {}
    slices = 1 if mesh == "tp=2" else 2
    expected = trained_with_noise(World(), "dp=1", {"accumulate": slices})
    torch.testing.assert_close(run_ranks(2, trained_with_noise, mesh, options)[0], expected, **EXACT)


def test_modules_as_a_list():
    """The step receives what was given; a name is an index."""
    body, head = pair().values()
    task = task_of({"body": body, "head": head})
    several = Modules([body, head], lambda given, batch: step({"body": given[0], "head": given[1]}, batch))
    train_task(World(), replace(task, model=several), epochs=EPOCHS)
    assert ["0", "1"] == [*replace(task, model=several).modules]
    named = {name.replace("body", "0").replace("head", "1"): tensor for name, tensor in by_hand().items()}
    torch.testing.assert_close(several.state_dict(), {name: named[name] for name in several.state_dict()}, **EXACT)


@pytest.mark.parametrize("name", ["a.b", "", "train"])
def test_a_name_that_a_module_cannot_have(name):
    """It is named."""
    with pytest.raises(TaskError, match=f"a module cannot be called '{name}': choose a word that torch does not use"):
        Modules({name: nn.Linear(1, 1)}, step)


def test_two_names_that_read_alike():
    """The second module would take the place of the first."""
    with pytest.raises(TaskError, match="two modules are called 1: give each a name of its own"):
        Modules({1: nn.Linear(1, 1), "1": nn.Linear(1, 1)}, step)


def test_each_module_is_put_in_training_mode_and_back():
    """As the only one is; a part that the user has set to evaluation mode stays so."""
    modules, seen = pair(), []
    modules["body"].eval()
    modules["head"][1].eval()

    def looking(given, batch):
        seen.append([given["body"].training, given["body"][1].training, given["head"][1].training])
        return step(given, batch)

    task = replace(task_of(modules), model=Modules(modules, looking))
    train_task(World(), task, steps=1)
    assert [[True, True, False]] == seen
    assert [False, False, True, False] == [
        modules["body"].training, modules["body"][1].training, modules["head"].training, modules["head"][1].training,
    ]  # fmt: skip


def test_evaluation_is_the_steps_loss():
    """Without gradients, in evaluation mode."""
    modules, val = pair(dropout=0.5), classes(7)
    row = train_task(World(), task_of(modules, val=val), steps=2).history[0]
    for module in modules.values():
        module.eval()
    assert row["val_loss"] == pytest.approx(step(modules, val).item(), abs=1e-12)


def test_a_metric_has_no_output():
    """It takes that of one model."""
    with pytest.raises(TaskError, match="a metric is measured on the output of one model, and here are several"):
        task_of(pair(), val=classes(7), metric="accuracy")


def test_a_parameter_of_two_optimizers():
    """The parameter and both optimizers are named."""
    task = task_of(pair())
    with pytest.raises(TaskError, match=r"optimizers body and all both hold parameter body\.0\.weight: give it to"):
        replace(task, optimizers={**task.optimizers, "all": torch.optim.SGD(task.model.parameters(), lr=0.1)})


class Normed(torch.optim.SGD):
    """Its update needs whole tensors."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        return super().step(closure)


def test_a_mesh_is_refused_for_any_of_the_optimizers():
    """Before a weight is touched."""
    modules = pair()
    task = task_of(modules)
    task = replace(task, optimizers={**task.optimizers, "head": Normed(modules["head"].parameters(), lr=0.1)})
    plan = Plan.create(ranks=2, cores=1, strategy="shard=2", batch_size=BATCH)
    with pytest.raises(PlanError, match="optimizer Normed needs a whole tensor, which mesh shard=2 splits"):
        estimate(task, plan)


def test_a_step_that_cannot_be_cut():
    """The statement is named."""
    modules = pair()

    def branching(given, batch):
        loss = step(given, batch)
        return loss if loss > 0 else -loss

    task = replace(task_of(modules), model=Modules(modules, branching))
    plan = Plan.create(ranks=2, cores=1, strategy="pp=2", batch_size=BATCH)
    with pytest.raises(TaskError, match=r"Modules cannot be cut into stages: its forward branches .*loss if loss > 0"):
        estimate(task, plan)


def left_in_parts(world, mesh):
    modules = pair()
    task = task_of(modules)
    train_task(world, task, strategy=mesh, epochs=EPOCHS, gather=False)
    for module in modules.values():
        with pytest.raises(TaskError, match="is sharded, because it was trained with gather=False"):
            nbdist.train(module, classes(8), loss="cross_entropy", device="cpu")
        assert nbdist.unshard(module, device="cpu") is module
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


@pytest.mark.parametrize("mesh", ["shard=2", "pp=2"])
def test_each_module_is_gathered_by_itself(run_ranks, mesh):
    """After gather=False."""
    state = run_ranks(2, left_in_parts, mesh)[0]
    torch.testing.assert_close(state, {name: by_hand()[name] for name in state}, **EXACT)


def test_what_is_sent_belongs_together():
    """Modules in what was given, optimizers over their parameters."""
    payload, segment = pack(task_of(pair()))
    task = unpack(payload)
    train_task(World(), task, epochs=EPOCHS)
    assert all(task.given[name] is module for name, module in task.modules.items())
    torch.testing.assert_close(state_of(task), by_hand(), **EXACT)
    segment.close()
