"""The running weighted mean of losses and metrics."""

from __future__ import annotations

import math

import pytest
import torch

from nbdist.core.sync.running_mean import RunningMean

CPU = torch.device("cpu")


def test_values_count_by_their_weight():
    """Tensors and numbers alike; the sums are float64 and may be added over ranks."""
    mean = RunningMean(CPU)
    mean.add(torch.tensor(1.0), 3)
    mean.add(5.0, torch.tensor(1))
    assert mean.value == 2.0
    assert torch.equal(torch.tensor([8.0, 4.0], dtype=torch.float64), mean.sums)


def test_a_mean_over_nothing_counts_nothing():
    """Not even if it is NaN, as a loss over ignored targets only."""
    mean = RunningMean(CPU)
    assert mean.value is None
    mean.add(torch.tensor(math.nan), 0)
    assert mean.value is None
    mean.add(2.0, 1)
    assert mean.value == 2.0


def test_many_small_values_are_not_lost():
    """Summed in float32, the last ones would be lost to rounding."""
    mean = RunningMean(CPU)
    mean.add(torch.tensor(1.0), 2**24)
    for _ in range(100):
        mean.add(torch.tensor(1.0), 1)
    assert mean.sums[0].item() == 2**24 + 100


@pytest.mark.parametrize("weight", [4, torch.tensor(4.0), torch.tensor(0.0)])
def test_adding_does_not_synchronize_the_device(weight):
    """There only tensor operations run: reading a value on the meta device would fail."""
    mean = RunningMean(torch.device("meta"))
    mean.add(torch.ones((), device="meta"), weight if isinstance(weight, int) else weight.to("meta"))
    assert mean.sums.device.type == "meta"
    assert mean.sums.dtype == torch.float64
