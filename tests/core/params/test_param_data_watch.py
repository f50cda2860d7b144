"""`DataWatch` calls back before a parameter's `data` is accessed, and leaves no trace when it is closed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nbdist.core.params.param_data_watch import DataWatch, get_data, set_data


@pytest.fixture
def pair():
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


def test_taking_and_replacing_are_announced(pair):
    """With the index, before the access; not for other parameters, nor for `get_data` and `set_data`."""
    seen: list[tuple[int, float]] = []
    watch = DataWatch(pair, lambda i: seen.append((i, pair[i].sum().item())))
    pair[1].data.mul_(2)
    pair[0].data = torch.zeros(2)
    nn.Parameter(torch.ones(1)).data.mul_(2)
    get_data(pair[0]).add_(1)
    set_data(pair[1], torch.zeros(3))
    watch.close()
    assert [(1, 3.0), (0, 2.0)] == seen
    assert [2.0, 0.0] == [parameter.sum().item() for parameter in pair]


def test_two_watches_of_one_parameter_are_both_called(pair):
    """Each until it is closed."""
    seen: list[str] = []
    first, second = (DataWatch(pair, lambda i, name=name: seen.append(name)) for name in ("first", "second"))
    _ = pair[0].data
    first.close()
    _ = pair[0].data
    second.close()
    assert ["first", "second", "second"] == seen


def test_nothing_is_left_of_a_watch(pair):
    """`nn.Parameter` is as before; closing twice is fine."""
    watch = DataWatch(pair, lambda i: None)
    assert all(type(parameter) is nn.Parameter for parameter in pair)
    watch.close()
    watch.close()
    assert "data" not in vars(nn.Parameter)
