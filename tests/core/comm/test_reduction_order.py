"""Reduction order: the same for every number of ranks."""

from __future__ import annotations

import pytest

from nbdist.core.comm.reduction_order import ReductionTree


def added(order):
    """The sum as text: brackets show the reduction order."""

    def plus(left, right):
        return f"({left}{right})"

    values = []
    for share in order.shares:
        held = []
        for term in share:
            order.add(held, (term, term + 1), "abcdefghijklmnopqrstuvwxyz"[term], plus)
        values.append([value for _, value in held])
    return order.total(values, plus)


@pytest.mark.parametrize("terms", [1, 2, 5, 7, 8, 12, 16, 24])
def test_a_tree_is_the_same_for_every_number_of_ranks(terms):
    """The terms' order and the brackets do not depend on the number of ranks."""
    (one,) = {added(ReductionTree.tree(terms, ranks)) for ranks in range(1, terms + 1)}
    assert "abcdefghijklmnopqrstuvwxyz"[:terms] == one.replace("(", "").replace(")", "")


def test_twelve_terms_fit_many_numbers_of_ranks():
    """1, 2 or 4 ranks sum one tree node each, 3 or 6 at most two."""
    assert [1, 1, 2, 1, 2] == [ReductionTree.tree(12, ranks).rows for ranks in (1, 2, 3, 4, 6)]


def test_a_chain_adds_one_rank_after_the_other():
    """The default reduction order over ranks."""
    assert "(((ab)c)d)" == added(ReductionTree.chain(4))
    assert ReductionTree.chain(4).rows == 1


def test_shares_are_neighbours_and_about_equal():
    """Every term is on exactly one rank."""
    shares = ReductionTree.tree(12, 5).shares
    assert list(range(12)) == [term for share in shares for term in share]
    assert {2, 3} == set(map(len, shares))
