"""Random number generators: derived seeds, saved and restored states."""

from __future__ import annotations

import random

import numpy as np
import torch

from nbdist.core.process import rng


def test_a_path_is_a_seed():
    """The same on every machine and in every process, different for every other path, and within 63 bits."""
    assert 4977548896219042708 == rng.derive(0, "slice", 1, 2)
    assert all(rng.derive(7, "slice", n, 2) == rng.derive_slice(7, ("slice", n), 2) for n in (0, 31, 32, 33, 95))
    assert rng.derive(7, "slice", 3, 5000) == rng.derive_slice(7, ("slice", 3), 5000)
    paths = [(0, "a"), (0, "b"), (1, "a"), ("0", "a", 1), (0, "a", 2), (0, "order", 12), (0, "order", 1, 2)]
    derived = {rng.derive(*path) for path in paths}
    assert len(paths) == len(derived)
    assert all(0 <= seed < 2**63 for seed in derived)


def test_seeding_reaches_every_generator_that_data_draws_from():
    """torch, NumPy's legacy generator and `random`; `fork_rng` restores all three."""

    def draw():
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    with rng.fork_rng(torch.device("cpu")):
        rng.seed_all(2**62 + 5)
        first = draw()
        rng.seed_all(2**62 + 5)
        assert first == draw()
        assert first != draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    with rng.fork_rng(torch.device("cpu")):
        draw()
    assert expected == draw()
