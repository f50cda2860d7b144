"""The order in which terms are added: floating-point sums have the same bits in the same order only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["Node", "ReductionTree"]

T = TypeVar("T")
Node = tuple[int, int]
"""The terms ``start ... stop - 1``, summed."""


class ReductionTree:
    """A binary tree over terms in a row, of which every rank has some neighbours.

    A rank sums the largest nodes of the tree that lie within its terms by itself, and the ranks sum those. Each node is
    always the sum of the same two, so the total has the same bits on any number of ranks.

    Attributes:
        terms: How many.
        shares: Each rank's terms, a range.
        nodes: The nodes that each rank sums by itself, from left to right.
        rows: The most that a rank has.
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
        """The terms of a rank: neighbours, about as many as any other rank's."""
        return range(rank * terms // ranks, (rank + 1) * terms // ranks)

    @classmethod
    def chain(cls, ranks: int) -> ReductionTree:
        """One term a rank, added one after the other: ((t0 + t1) + t2) + ..."""
        return cls(ranks, ranks, lambda _start, stop: stop - 1)

    @classmethod
    def tree(cls, terms: int, ranks: int) -> ReductionTree:
        """Halves of halves. An odd number is cut at an even place, so that other shares than halves fit too.

        Of twelve terms, 1, 2 or 4 ranks sum one node each, and 3 or 6 two at most.
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
        """Put the next node behind those that are `held`, and let the last ones become their sum where they can."""
        held.append((node, value))
        while len(held) > 1 and (parent := self._parents.get((held[-2][0], held[-1][0]))):
            (_, left), (_, right) = held[-2:]
            held[-2:] = [(parent, plus(left, right))]

    def total(self, values: Iterable[Sequence[T]], plus: Callable[[T, T], T]) -> T:
        """The sum of all: `values` of each rank's nodes, more than it has being left out."""
        held: list[tuple[Node, T]] = []
        for nodes, mine in zip(self.nodes, values, strict=True):
            for node, value in zip(nodes, mine, strict=False):
                self.add(held, node, value, plus)
        ((_, total),) = held
        return total
