"""The mesh: ranks laid on a grid of named axes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbdist.errors import PlanError, suggest

__all__ = ["STRATEGY_WORDS", "Mesh"]

STRATEGY_WORDS = {"data": "dp", "ddp": "dp"}
"""Strategy words, each a shorthand for a mesh with all ranks on one axis."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of the mesh axes; their product is the number of ranks.

    Args:
        dp: Degree of data parallelism: how many replicas of the model train side by side.
    """

    dp: int = 1

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise PlanError(f"mesh axis dp={self.dp} must be at least 1.")

    def __str__(self) -> str:
        return f"dp={self.dp}"

    @property
    def size(self) -> int:
        """Number of ranks on the whole mesh."""
        return self.dp

    @classmethod
    def parse(cls, strategy: str, ranks: int) -> Mesh:
        """Read a strategy: a word (``data``, alias ``ddp``) or a mesh written out (``dp=4``).

        Raises:
            PlanError: The word or axis is unknown, or the degrees do not multiply to `ranks`.
        """
        known = f"use {', '.join(STRATEGY_WORDS)} or dp={ranks}."
        word = str(strategy).strip().lower()
        if word in STRATEGY_WORDS:
            return cls(**{STRATEGY_WORDS[word]: ranks})
        degrees: dict[str, int] = {}
        for part in word.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", part)
            if match is None:
                raise PlanError(f"unknown strategy {strategy!r}: {known}{suggest(word, STRATEGY_WORDS)}")
            axis, degree = match.groups()
            if axis not in cls.__dataclass_fields__:
                raise PlanError(f"unknown mesh axis {axis!r} in strategy {strategy!r}: {known}")
            if axis in degrees:
                raise PlanError(f"mesh axis {axis!r} stands twice in strategy {strategy!r}.")
            degrees[axis] = int(degree)
        mesh = cls(**degrees)
        if mesh.size != ranks:
            raise PlanError(
                f"strategy {strategy!r} needs {mesh.size} ranks, but there are {ranks}: "
                f"use dp={ranks}, or start {mesh.size} engines."
            )
        return mesh
