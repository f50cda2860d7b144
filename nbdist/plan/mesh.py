"""The device mesh: ranks on a grid of named axes (``dp``, ``pp``, ``shard``, ``tp``)."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from nbdist.errors import PlanError, suggest

__all__ = ["AXES", "STRATEGY_WORDS", "Mesh"]

AXES = ("dp", "pp", "shard", "tp")
"""The axes, the slowest first: neighbours on ``tp``, which communicate most, are neighbouring ranks, and a host holds
whole replicas where it can, so that a lost one takes with it nothing that no other has."""

STRATEGY_WORDS = {
    "data": "dp", "ddp": "dp", "shard": "shard", "fsdp": "shard", "pipeline": "pp", "pp": "pp", "tensor": "tp",
    "tp": "tp",
}  # fmt: skip
"""Strategy words, each a shorthand for a mesh with all ranks on one axis."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of the mesh axes; their product is the number of ranks.

    Args:
        dp: Data parallel: how many replicas of the model train side by side.
        pp: Pipeline parallel: over how many ranks the model is cut into stages.
        shard: Data parallel too, with the parameters of a replica sharded over its ranks (FSDP).
        tp: Tensor parallel: over how many ranks each large layer is split.
    """

    dp: int = 1
    pp: int = 1
    shard: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise PlanError(f"mesh axis {axis}={getattr(self, axis)} must be at least 1.")

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "dp=1"

    @property
    def size(self) -> int:
        """Number of ranks on the whole mesh."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The degrees in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """Over how many ranks a global batch is distributed."""
        return self.dp * self.shard

    @property
    def data_places(self) -> tuple[int, ...]:
        """Of each rank, its place among the ranks over which a global batch is distributed."""
        lines = self.groups("shard", "dp")
        return tuple(next(line.index(rank) for line in lines if rank in line) for rank in range(self.size))

    def coordinate(self, rank: int, axis: str) -> int:
        """The coordinate of a rank on an axis."""
        return self._coordinates(rank)[AXES.index(axis)]

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that differ only on `axes`: a partition of all ranks, each group in the order of `AXES`."""
        fixed = [axis not in axes for axis in AXES]

        def key(rank: int) -> tuple[int, ...]:
            return tuple(c for c, keep in zip(self._coordinates(rank), fixed, strict=True) if keep)

        ranks = sorted(range(self.size), key=lambda rank: (key(rank), rank))
        return [list(group) for _, group in itertools.groupby(ranks, key)]

    def groups_of(self, axis: str, coordinates: Iterable[int]) -> list[list[int]]:
        """`groups` along an axis, of the ranks at some coordinates only; every other rank is a group of its own."""
        chosen = sorted(coordinates)
        lines = self.groups(axis)
        together = [[line[coordinate] for coordinate in chosen] for line in lines]
        return together + [[rank] for line in lines for i, rank in enumerate(line) if i not in chosen]

    def ring(self, axis: str) -> list[tuple[int, int]]:
        """The pairs of ranks that are neighbours along an axis, the last and the first too; each pair once, sorted."""
        pairs = [pair for line in self.groups(axis) for pair in zip(line, [*line[1:], line[0]], strict=True)]
        return sorted({(min(pair), max(pair)) for pair in pairs})

    def _coordinates(self, rank: int) -> tuple[int, ...]:
        coordinates = []
        for degree in reversed(self.shape):
            rank, coordinate = divmod(rank, degree)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    @classmethod
    def parse(cls, strategy: str, ranks: int) -> Mesh:
        """Read a strategy: a word such as ``data`` or ``pipeline``, or a mesh written out (``dp=2,pp=2``).

        Raises:
            PlanError: The word or axis is unknown, or the degrees do not multiply to `ranks`.
        """
        known = f"use {', '.join(STRATEGY_WORDS)} or a mesh such as {_example(ranks)}."
        word = str(strategy).strip().lower()
        if word in STRATEGY_WORDS:
            return cls(**{STRATEGY_WORDS[word]: ranks})
        degrees: dict[str, int] = {}
        for part in word.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if match is None:
                raise PlanError(f"unknown strategy {strategy!r}: {known}{suggest(word, STRATEGY_WORDS)}")
            axis, degree = match.groups()
            if axis not in AXES:
                raise PlanError(f"unknown mesh axis {axis!r} in strategy {strategy!r}: {known}{suggest(axis, AXES)}")
            if axis in degrees:
                raise PlanError(f"mesh axis {axis!r} stands twice in strategy {strategy!r}.")
            degrees[axis] = int(degree)
        mesh = cls(**degrees)
        if mesh.size != ranks:
            raise PlanError(
                f"strategy {strategy!r} needs {mesh.size} ranks, but there are {ranks}: "
                f"use {_example(ranks, degrees)}, or start {mesh.size} engines."
            )
        return mesh


def _example(ranks: int, axes: Iterable[str] = ("dp",)) -> str:
    """A mesh of so many ranks, over `axes` where their number allows it."""
    first, *others = axes
    if others and ranks % 2 == 0 and ranks > 2:
        return f"{first}={ranks // 2},{others[0]}=2"
    return f"{first}={ranks}"
