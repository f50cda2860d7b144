"""Mixed precision: autocast, and the loss scale of fp16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nbdist.core.optim import precision
from nbdist.core.optim.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("word", "dtype", "scales"),
    [("full", torch.float32, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)],
)
def test_forward_computes_in_it(word, dtype, scales):
    """Weights keep their dtype; only fp16 is scaled."""
    made, layer = Precision(word, CPU), nn.Linear(3, 2)
    with made.autocast():
        assert layer(torch.ones(1, 3)).dtype is dtype
    assert layer.weight.dtype is torch.float32
    assert made.scales is scales
    assert made.scale == (2.0**16 if scales else 1.0)


def test_an_overflow_halves_the_scale():
    """Each overflow; and the count of steps without one restarts."""
    made = Precision("fp16", CPU)
    made.adapt(False)
    made.adapt(False)
    assert made.scale == 2.0**14


def test_many_good_steps_double_it(monkeypatch):
    """Each time after so many in a row."""
    monkeypatch.setattr(precision, "_GROWTH_STEPS", 3)
    made = Precision("fp16", CPU)
    scales = []
    for finite in (True, True, False, True, True, True, True, True, True):
        made.adapt(finite)
        scales.append(math.log2(made.scale))
    assert scales == [16, 16, 15, 15, 15, 16, 16, 16, 17]


def test_the_scale_has_an_end():
    """A loss that stays nan does not make it zero."""
    made = Precision("fp16", CPU)
    for _ in range(2000):
        made.adapt(False)
    assert made.scale == 2.0**-24
