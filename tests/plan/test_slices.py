"""How a batch is cut into slices."""

from __future__ import annotations

import pytest

from nbdist.plan import slice_bounds


@pytest.mark.parametrize("slices", [1, 2, 3, 4, 6, 12])
def test_every_batch_is_cut_well(slices):
    """Slices cover the batch in order, are balanced, and hold a single sample only where there is no other way."""
    for samples in range(1, 60):
        bounds = slice_bounds(samples, slices)
        assert slices == len(bounds)
        assert list(range(samples)) == [i for start, stop in bounds for i in range(start, stop)]
        sizes = [stop - start for start, stop in bounds]
        filled = [size for size in sizes if size]
        assert sizes == filled + [0] * (slices - len(filled)), "the empty ones come last"
        assert max(filled) - min(filled) <= 1
        assert min(filled) > 1 or samples == 1
        assert len(filled) == slices or samples < 2 * slices


def test_some_cuts():
    """Full batches fill every slice; a short one fills fewer."""
    assert [(0, 5), (5, 10), (10, 16)] == slice_bounds(16, 3)
    assert [(0, 2), (2, 5), (5, 5), (5, 5)] == slice_bounds(5, 4)
    assert [(0, 1), (1, 1)] == slice_bounds(1, 2)
