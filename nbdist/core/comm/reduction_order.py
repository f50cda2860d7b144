"""Reduction order: a sum of floats has the same bits only if its terms are added in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["Node", "ReductionTree"]

T = TypeVar("T")
Node = tuple[int, int]
"""A tree node: the sum of the terms ``start ... stop - 1``."""


class ReductionTree:
    """A binary reduction tree over a row of terms; every rank holds a contiguous range of them.

    A rank first sums the largest tree nodes that lie within its range; then the ranks sum those nodes. Each node is
    always the sum of the same two children, so the total has the same bits on any number of ranks.

    Attributes:
        terms: How many.
        shares: Each rank's terms, a range.
        nodes: The tree nodes that each rank sums locally, from left to right.
        rows: The largest number of nodes on one rank.
    """

    def __init__(self, terms: int, ranks: int, middle: Callable[[int, int], int]) -> None:
        self.terms = terms
        self.shares = [self.share(terms, rank, ranks) for rank in range(ranks)]
        self._parents: dict[tuple[Node, Node], Node] = {}
        self._grow((0, terms), middle)
        self.nodes: list[list[Node]] = []
        for share in self.shares:
            held: list[tuple[Node, None]] = []
            for term in share:
                self.add(held, (term, term + 1), None, lambda _left, _right: None)
            self.nodes.append([node for node, _ in held])
        self.rows = max(map(len, self.nodes))

    @staticmethod
    def share(terms: int, rank: int, ranks: int) -> range:
        """A rank's terms: a contiguous range; the ranges differ in length by one at most."""
        return range(rank * terms // ranks, (rank + 1) * terms // ranks)

    @classmethod
    def chain(cls, ranks: int) -> ReductionTree:
        """One term per rank, added in rank order: ((t0 + t1) + t2) + ..."""
        return cls(ranks, ranks, lambda _start, stop: stop - 1)

    @classmethod
    def tree(cls, terms: int, ranks: int) -> ReductionTree:
        """Cut in halves, recursively; an odd length at an even term, so that thirds, too, consist of few nodes.

        Of twelve terms, 1, 2 or 4 ranks sum one node each; 3 or 6 ranks sum at most two.
        """
        return cls(terms, ranks, lambda start, stop: (start + stop + ((start + stop) // 2) % 2) // 2)

    def _grow(self, node: Node, middle: Callable[[int, int], int]) -> None:
        start, stop = node
        if stop - start > 1:
            left, right = (start, middle(start, stop)), (middle(start, stop), stop)
            self._parents[left, right] = node
            self._grow(left, middle)
            self._grow(right, middle)

    def add(self, held: list[tuple[Node, T]], node: Node, value: T, plus: Callable[[T, T], T]) -> None:
        """Append the next node to `held`; while the last two nodes are siblings, replace them by their sum."""
        held.append((node, value))
        while len(held) > 1 and (parent := self._parents.get((held[-2][0], held[-1][0]))):
            (_, left), (_, right) = held[-2:]
            held[-2:] = [(parent, plus(left, right))]

    def total(self, values: Iterable[Sequence[T]], plus: Callable[[T, T], T]) -> T:
        """The sum of all terms, from the `values` of each rank's nodes; surplus values of a rank are ignored."""
        held: list[tuple[Node, T]] = []
        for nodes, mine in zip(self.nodes, values, strict=True):
            for node, value in zip(nodes, mine, strict=False):
                self.add(held, node, value, plus)
        ((_, total),) = held
        return total
