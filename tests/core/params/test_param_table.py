"""`ParamTable`: a model's parameters and buffers by name."""

from __future__ import annotations

import torch
from problems import mlp
from torch import nn

from nbdist.core.params.param_table import ParamTable


def model():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    net.register_buffer("scratch", torch.zeros(1), persistent=False)
    return net


def test_everything_stands_in_the_table_once():
    """A tied parameter under its first name; frozen parameters and non-persistent buffers too."""
    table = ParamTable.of(model())
    assert ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"] == list(table.parameters)
    assert ["0.weight", "0.bias", "1.weight", "1.bias"] == list(table.trainable)
    assert ["scratch", "1.running_mean", "1.running_var", "1.num_batches_tracked"] == list(table.buffers)
    assert list(table.tensors) == [*table.parameters, *table.buffers]


def test_weights_come_home_in_place():
    """Loading is in place, so that every reference to the model's tensors sees it, and ties hold."""
    target, source = model(), model()
    parameters = list(target.parameters())
    with torch.no_grad():
        for tensor in [*source.parameters(), *source.buffers()]:
            tensor.add_(1)
    ParamTable.of(target).load_(ParamTable.of(source).tensors)
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), source.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, source.parameters(), strict=True))
    assert target[2].weight is target[0].weight is parameters[0]


def test_an_expanded_buffer_can_be_loaded():
    """It stays expanded while nothing changes, and else gets memory of its own."""
    target, source = nn.Module(), nn.Module()
    for module in (target, source):
        module.register_buffer("same", torch.ones(1).expand(3))
        module.register_buffer("other", torch.zeros(1).expand(3))
    source.other = torch.arange(3.0)
    ParamTable.of(target).load_(ParamTable.of(source).tensors)
    assert [0.0, 1.0, 2.0] == target.other.tolist()
    assert ((0,), [1.0, 1.0, 1.0]) == (target.same.stride(), target.same.tolist())


def test_what_is_read_is_not_copied():
    """The table's tensors are the model's own memory, detached."""
    net = mlp()
    tensor = ParamTable.of(net).tensors["0.weight"]
    assert net[0].weight.data_ptr() == tensor.data_ptr()
    assert not tensor.requires_grad


def test_a_buffer_that_is_assigned_anew_is_the_one_in_the_table():
    net = model()
    table = ParamTable.of(net)
    net[1].running_mean = torch.ones(2)
    assert table.buffers["1.running_mean"] is net[1].running_mean
    assert table.tensors["1.running_mean"].sum() == 2
