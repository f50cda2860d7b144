"""The trained optimizer is loaded into the notebook's own object, with the state that one process would have left."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from torch import nn

from nbdist.core.optim.trained_optimizer import TrainedOptimizer
from nbdist.core.params.param_table import ParamTable
from nbdist.core.transfer.payload import pack, unpack


class Keeping(torch.optim.SGD):
    """It has attributes of many types."""

    __slots__ = ("slot",)

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        self.calls, self.slot, self.mean = 0, 0, torch.zeros(2)
        self.seen, self.also = [], {"last": 0}
        self.recent, self.array = collections.deque([0], maxlen=2), np.zeros(2)
        self.own = list(self.param_groups[0]["params"])
        self.by_parameter = dict.fromkeys(self.own, 0)
        self.memory = self.own[0].data
        self.first = self.second = torch.zeros(1)
        self.log = print
        self.mixed = [1, print]

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        self.slot += 1
        self.mean = self.mean + 1
        self.first = self.first + 1
        self.seen.append(self.calls)
        self.also["last"] = self.calls
        self.recent.append(self.calls)
        self.array[0] += 1
        self.by_parameter[self.own[0]] += 1
        self.mixed[0] += 1
        self.made = (self.calls, self.own[1])
        self.param_groups[0]["lr"] = 0.1 / self.calls


class Wrapping(torch.optim.Optimizer):
    """An optimizer that wraps another one, like Lookahead; its ``__getstate__`` leaves attributes out."""

    def __init__(self, inner):
        self.inner = inner
        self.state = collections.defaultdict(dict)
        self.param_groups = inner.param_groups
        self.fast_state = inner.state
        self.defaults = inner.defaults

    def __getstate__(self):
        return {"state": self.state, "inner": self.inner, "param_groups": self.param_groups}

    def step(self, closure=None):
        self.inner.step(closure)
        for parameter in self.inner.param_groups[0]["params"]:
            self.state[parameter]["slow"] = parameter.detach().clone()


def stepped(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def train_elsewhere(model, optimizer, steps=2):
    """Step an unpickled copy of an optimizer, and load its state into this one."""
    payload, segment = pack((model, optimizer))
    model_copy, optimizer_copy = unpack(payload)
    segment.close()
    for _ in range(steps):
        stepped(optimizer_copy)
    payload, segment = pack(TrainedOptimizer(optimizer_copy, ParamTable.of(model_copy).objects))
    trained = unpack(payload)
    segment.close()
    trained.load_into(optimizer, ParamTable.of(model).objects)


def described(value, model):
    """A value in a form that can be compared."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if id(value) in names:
        return names[id(value)]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {described(key, model): described(held, model) for key, held in value.items()}
    return [described(item, model) for item in value] if isinstance(value, (list, tuple, collections.deque)) else value


def test_a_buffer_of_the_model_stays_that():
    """References to the model's tensors are restored as such, not as copies."""
    model = nn.BatchNorm1d(2)
    mine = torch.optim.SGD(model.parameters())
    mine.mean = model.running_mean
    train_elsewhere(model, mine)
    assert model.running_mean is mine.mean


def test_what_a_run_has_made_of_an_optimizer_comes_home():
    """State, groups and attributes are those after two steps in this process, with the model's own parameters."""
    models = [nn.Linear(2, 1) for _ in range(2)]
    mine, alone = (Keeping(model.parameters()) for model in models)
    stepped(alone)
    stepped(alone)
    train_elsewhere(models[0], mine)
    left = {"memory", "log"}
    names = [*vars(alone).keys() - left, "slot"]
    assert {name: described(getattr(alone, name), models[1]) for name in names} == {
        name: described(getattr(mine, name), models[0]) for name in names
    }
    assert set(models[0].parameters()) == set(mine.state)


def test_what_holds_on_to_a_part_of_it_sees_it():
    """Containers are filled in place, and a view of a parameter stays one."""
    model = nn.Linear(2, 1)
    optimizer = Keeping(model.parameters())
    seen, recent, groups, state = optimizer.seen, optimizer.recent, optimizer.param_groups, optimizer.state
    train_elsewhere(model, optimizer)
    assert ([1, 2], [1, 2]) == (seen, list(recent))
    assert groups is optimizer.param_groups
    assert state is optimizer.state
    assert optimizer.memory.data_ptr() == model.weight.data_ptr()
    assert [[2.0], [0.0]] == [optimizer.first.tolist(), optimizer.second.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_comes_home_in_its_own_type(dtype):
    """A moment in another dtype than its parameter's is not cast."""
    model = nn.Linear(2, 1).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["moment"] = torch.full((1, 2), 1 / 3, dtype=dtype)
    train_elsewhere(model, optimizer, steps=0)
    assert torch.equal(torch.full((1, 2), 1 / 3, dtype=dtype), optimizer.state[model.weight]["moment"])


def test_an_optimizer_within_another_comes_home():
    """The same parameters, with the inner one's state, although the outer one's ``__getstate__`` leaves it out."""
    model = nn.Linear(2, 1)
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = Wrapping(inner)
    train_elsewhere(model, optimizer)
    assert inner is optimizer.inner
    assert inner.state is optimizer.fast_state
    assert [2.0, 2.0] == [inner.state[parameter]["step"].item() for parameter in model.parameters()]
    assert set(model.parameters()) == set(optimizer.state)


def test_a_hook_that_removed_itself_is_gone_at_home_too():
    """Attributes that are functions stay the same objects."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = optimizer.register_step_post_hook(print)
    optimizer.once = optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.once.remove())
    train_elsewhere(model, optimizer)
    assert {} == dict(optimizer._optimizer_step_pre_hooks)
    assert {kept.id: print} == dict(optimizer._optimizer_step_post_hooks)


def test_hooks_of_its_state_are_not_run_on_the_way():
    """Training in one process would not have run them."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    train_elsewhere(model, optimizer)
    assert not calls
    assert 2.0 == optimizer.state[model.weight]["step"].item()
