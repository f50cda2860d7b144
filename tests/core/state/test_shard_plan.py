"""Shard plan: which rank saves which shards, and what cannot be saved."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from problems import alone, classes, mlp, train
from saved_checkpoints import Net, adamw, net, over
from torch.nn import functional as F

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.optim.json_value import plain
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.placement import Placement
from nbdist.core.params.weight_copies import WeightCopies
from nbdist.core.state.shard_plan import ShardPlan, buffer_entry, check_state, gather_texts, key_of
from nbdist.errors import TaskError
from nbdist.plan import Mesh, Plan

made_plans = []


@pytest.fixture(autouse=True)
def _closed():
    """Close a test's shard plans, which watch the data of frozen parameters."""
    yield
    while made_plans:
        made_plans.pop().close()


def shard_plan_of(model, optimizer=None, world=None, changed=()):
    world = world or World()
    made = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    axes, table = MeshChannels(world, Mesh(dp=world.size)), ParamTable.of(model)
    copies = WeightCopies(Plan.create(ranks=world.size, cores=1), table, axes)
    made_plans.append(ShardPlan(model, table, {"": made}, axes, copies, changed))
    return made_plans[-1]


def names(shards):
    return {key.partition("|")[0] for key in shards}


def saved_keys(world):
    model = net()
    shards = shard_plan_of(model, over(adamw, model), world)
    return {*shards.changing(buffers=True)}, {*shards.frozen()}


def test_ranks_share_the_work(run_ranks):
    """Of identical shards one rank saves each; every rank saves its statistics; no rank saves most of the model."""
    (first, first_frozen), (second, second_frozen) = run_ranks(2, saved_keys)
    model = net()
    assert not first & second
    assert {*dict(model.named_parameters())} == {
        key.partition("|")[0]
        for key in first | second | first_frozen | second_frozen
        if key.partition("|")[0] in dict(model.named_parameters())
    }
    for name, _ in model.named_buffers():
        assert key_of(name, "", None, None) in first
        assert key_of(name, buffer_entry(1), None, None) in second
    assert 5 <= len(first) - len(dict(model.named_buffers()))
    assert 5 <= len(second) - len(dict(model.named_buffers()))
    assert {"ups.1.weight", "ups.1.bias"} == names(first_frozen | second_frozen)


def test_what_never_changes_is_left_out():
    """Frozen parameters, and large buffers until they are written."""
    model = Net()
    model.register_buffer("mask", torch.ones(100_000))
    model.register_buffer("small", torch.ones(3))
    shards = shard_plan_of(model)
    assert {"small", "first.weight"} <= names(shards.changing())
    assert not {"mask", "ups.1.weight"} & names(shards.changing())
    assert "mask" in names(shards.changing(buffers=True))
    assert {"ups.1.weight", "ups.1.bias"} == names(shards.frozen())
    model.mask.mul_(2)
    assert "mask" in names(shards.changing())
    assert "mask" in names(shard_plan_of(model, changed={"mask"}).changing())


def test_a_buffer_that_replaces_another():
    """The model's present buffers are saved; a buffer under two names is saved twice."""
    model = Net()
    model.register_buffer("one", torch.zeros(2))
    model.register_buffer("two", torch.zeros(2))
    shards = shard_plan_of(model)
    model.one = model.two = torch.ones(2)
    kept = shards.changing()
    assert all((kept[key_of(name, "", None, None)] == 1).all() for name in ("one", "two"))


class Noting(torch.optim.SGD):
    """An optimizer with state that is not a tensor."""

    def __init__(self, params, lr=0.1, kept=None, name="note"):
        super().__init__(params, lr=lr)
        self.kept, self.name = kept, name

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][self.name] = self.kept


@pytest.mark.parametrize("kept", [object(), {1: 2}, {"a": {1}}], ids=["object", "numbers as keys", "a set"])
def test_state_that_json_cannot_hold(tmp_path, kept):
    """With checkpoints, the error comes after the first step, not at the end."""
    steps = []
    with pytest.raises(TaskError, match=r"the optimizer's note is a \w+, which a checkpoint cannot hold"):
        alone(
            mlp(), classes(16), optimizer=functools.partial(Noting, kept=kept), checkpoint=str(tmp_path / "new"),
            steps=3, batch_size=8, loss=lambda output, y: steps.append(1) or F.cross_entropy(output, y),
        )  # fmt: skip
    assert 1 == len(steps)


@pytest.mark.parametrize("name", [3, "a|b", "@1"])
def test_state_under_a_name_with_another_meaning(tmp_path, name):
    """It would be loaded as something else."""
    with pytest.raises(TaskError, match=r"the optimizer's state .* cannot be saved: name it by a word"):
        alone(
            mlp(), classes(16), optimizer=functools.partial(Noting, kept=3.0, name=name), checkpoint=str(tmp_path),
            steps=1, batch_size=8,
        )  # fmt: skip


def test_a_setting_that_json_cannot_hold(tmp_path):
    """The error comes before the first step."""
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model.parameters(), "mine": object()}], lr=0.1)
    with pytest.raises(TaskError, match="the optimizer's mine is a object, which a checkpoint cannot hold"):
        alone(model, classes(16), optimizer=optimizer, checkpoint=str(tmp_path), steps=1, loss=lambda *_: 1 / 0)


class Factored(torch.optim.SGD):
    """Has state of another shape than its parameter."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["rows"] = parameter.detach().reshape(len(parameter), -1).sum(1)[:1]


def test_state_that_cannot_be_cut():
    """With sharded parameters, the error comes after the first step."""
    model = mlp()
    optimizer = Factored(model.parameters(), lr=0.1)
    model(classes(4)[0]).sum().backward()
    optimizer.step()
    table = ParamTable.of(model)
    check_state(table, [optimizer])
    table.placements["0.weight"] = Placement(layout=model[0].weight.to("meta"), sharded=True)
    with pytest.raises(TaskError, match=r"the optimizer's rows of 0.weight has shape \[1\], which is not its param"):
        check_state(table, [optimizer])


def factored_in_parts(world, folder):
    try:
        train(
            world, mlp(), classes(16), optimizer=functools.partial(Factored, lr=0.1), checkpoint=folder, steps=2,
            batch_size=8, strategy="shard",
        )  # fmt: skip
    except TaskError as error:
        return str(error)


def test_all_ranks_report_a_state_that_cannot_be_cut(run_ranks, tmp_path):
    """No rank is left waiting."""
    for text in run_ranks(2, factored_in_parts, str(tmp_path)):
        assert "on a mesh with tp or shard it cannot be saved" in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None), (True, True), (3, 3), (2.5, 2.5), ("a", "a"), ((1, [2]), [1, [2]]), ({"a": (1,)}, {"a": [1]}),
        (torch.tensor(2.0), 2.0), (torch.tensor([4]), 4),
    ],
)  # fmt: skip
def test_plain_values(value, expected):
    """As JSON returns them, except tuples."""
    assert expected == plain(value, "it")


@pytest.mark.parametrize("value", [torch.tensor(1j), np.complex64(1), [np.datetime64(0, "s")], {1: 2}, b"a"])
def test_what_json_does_not_return_is_no_plain_value(value):
    """The error is one sentence, not a later TypeError of the JSON encoder."""
    with pytest.raises(TaskError, match=r"it is a .*, which a checkpoint cannot hold"):
        plain(value, "it")


def reported(world):
    return gather_texts(f"{world.rank} é", world.channel())


def test_all_ranks_receive_all_texts(run_ranks):
    """Ordered by rank."""
    assert [["0 é", "1 é", "2 é"]] * 3 == run_ranks(3, reported)


def test_keys_tell_parts_apart():
    """By tensor, entry, and part; names may contain any character."""
    assert "a|b|c|step|whole|0|0" == key_of("a|b|c", "step", None, None)
    assert "w||part|1|0" == key_of("w", "", 1, None)
    assert "w||part|0|2" == key_of("w", "", None, 2)
    assert ("", "@2") == (buffer_entry(0), buffer_entry(2))
