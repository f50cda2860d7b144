"""Precision: autocast, and the scale that keeps small gradients of fp16."""

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
    """Weights stay as they are; only fp16 is scaled."""
    made, layer = Precision(word, CPU), nn.Linear(3, 2)
    with made.autocast():
        assert layer(torch.ones(1, 3)).dtype is dtype
    assert layer.weight.dtype is torch.float32
    assert made.scales is scales
    assert made.scale == (2.0**16 if scales else 1.0)


def test_an_overflow_halves_the_scale():
    """Each one; and the count of good steps begins anew."""
    made = Precision("fp16", CPU)
    made.adapt(False)
    made.adapt(False)
    assert made.scale == 2.0**14


def test_many_good_steps_double_it(monkeypatch):
    """As many in a row, again and again."""
    monkeypatch.setattr(precision, "_GROWTH_STEPS", 3)
    made = Precision("fp16", CPU)
    scales = []
    for finite in (True, True, False, True, True, True, True, True, True):
        made.adapt(finite)
        scales.append(math.log2(made.scale))
    assert scales == [16, 16, 15, 15, 15, 16, 16, 16, 17]


def test_the_scale_has_an_end():
    """A loss that is no number for ever does not make it zero."""
    made = Precision("fp16", CPU)
    for _ in range(2000):
        made.adapt(False)
    assert made.scale == 2.0**-24
