"""Cutting costs into parts."""

from __future__ import annotations

import itertools
import random

import pytest

from nbdist.errors import PlanError
from nbdist.plan.balance import partition


def largest(costs, cuts, edges=None):
    edges = edges or [0.0] * len(costs)
    bounds = [0, *cuts, len(costs)]
    ends = [0.0, *(edges[c] for c in cuts), 0.0]
    return max(sum(costs[a:b]) + ends[i] + ends[i + 1] for i, (a, b) in enumerate(itertools.pairwise(bounds)))


def test_equal_costs_are_dealt_out():
    assert [2, 4, 6] == partition([1.0] * 8, 4)
    assert [1, 4] == partition([3, 1, 1, 1, 3], 3)
    assert [] == partition([1, 2], 1)


def test_edges_draw_the_cut_away():
    """A balanced cut that is expensive to cross loses to a cheap one beside it."""
    assert [2] == partition([1.0] * 4, 2)
    assert [1] == partition([1.0] * 4, 2, edges=[0, 0, 5, 5])


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_are_better(seed):
    """Compared with all possible ones."""
    rng = random.Random(seed)
    count, parts = rng.randint(4, 9), rng.randint(2, 4)
    costs = [rng.choice([0, rng.random()]) for _ in range(count)]
    edges = [rng.random() / 2 for _ in range(count)]
    allowed = sorted(rng.sample(range(1, count), rng.randint(parts - 1, count - 1)))
    cuts = partition(costs, parts, edges, allowed)
    assert set(cuts) <= set(allowed)
    assert cuts == sorted(set(cuts))
    assert len(cuts) == parts - 1
    best = min(largest(costs, chosen, edges) for chosen in itertools.combinations(allowed, parts - 1))
    assert largest(costs, cuts, edges) == pytest.approx(best, rel=1e-5)


def test_large_models_can_be_cut():
    rng = random.Random(0)
    costs = [rng.random() for _ in range(3000)]
    cuts = partition(costs, 16, [rng.random() for _ in range(3000)])
    assert largest(costs, cuts) < 1.05 * sum(costs) / 16


def test_nothing_costs_anything():
    assert [1, 2] == sorted(partition([0.0] * 3, 3))


@pytest.mark.parametrize(("count", "parts", "allowed", "says"), [
    (3, 4, None, "4 parts need 3 places to cut, but there are only 2: at most 3 parts"),
    (9, 3, [0, 5, 9], "only 1"),
    (3, 0, None, "at least 1"),
])  # fmt: skip
def test_too_few_places(count, parts, allowed, says):
    with pytest.raises(PlanError, match=says):
        partition([1.0] * count, parts, None, allowed)
