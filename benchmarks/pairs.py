"""Comparing two sides in turn: ours, theirs, ours, theirs, so that a machine whose speed drifts does not decide it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
from collections.abc import Callable

__all__ = ["Comparison", "arguments", "compare", "report", "with_and_without"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Figures of both sides, pair by pair.

    Args:
        name: What was compared.
        unit: Of the figures, of which less is better.
        ours: Our figures.
        peer: The peer's, in the same order.
        target: What was wanted, in words.
    """

    name: str
    unit: str
    ours: list[float]
    peer: list[float]
    target: str

    @property
    def ratios(self) -> list[float]:
        """Ours over the peer's, pair by pair."""
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]

    def interval(self, share: float = 0.95) -> tuple[float, float]:
        """Where the median ratio lies with probability `share`, by resampling the pairs."""
        draw = random.Random(0)
        medians = sorted(statistics.median(draw.choices(self.ratios, k=len(self.ratios))) for _ in range(2000))
        cut = round(len(medians) * (1 - share) / 2)
        return medians[cut], medians[-1 - cut]

    def line(self, faster: bool) -> str:
        """One line of a table; `faster` says how many times as fast we are in place of ours over theirs."""
        ratios = sorted(1 / ratio for ratio in self.ratios) if faster else sorted(self.ratios)
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        shown = [f"{r:.2f}" if r >= 0.1 else f"{r:.3f}" for r in (statistics.median(ratios), ratios[0], ratios[-1])]
        middle = f"{shown[0]:>5} ({shown[1]} to {shown[2]})"
        return f"{self.name:<44} {ours:9.2f} {peer:9.2f} {self.unit:<4} {middle:<22} {self.target}"


def compare(
    name: str, unit: str, target: str, ours: Callable[[], float], peer: Callable[[], float], pairs: int
) -> Comparison:
    """Measure both sides in turn, `pairs` times."""
    figures = [(ours(), peer()) for _ in range(pairs)]
    mine, theirs = (list(side) for side in zip(*figures, strict=True))
    return Comparison(name=name, unit=unit, ours=mine, peer=theirs, target=target)


def with_and_without(measure: Callable[[bool], float], pairs: int) -> list[tuple[float, float]]:
    """Figures with something and without it, by pair; which comes first changes from pair to pair."""
    figures = []
    for i in range(pairs):
        first, second = measure(i % 2 == 0), measure(i % 2 == 1)
        figures.append((first, second) if i % 2 == 0 else (second, first))
    return figures


def arguments(description: str | None, pairs: int) -> argparse.ArgumentParser:
    """The options that every benchmark takes; `pairs` is the default number of pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs, metavar="N", help=f"Pairs of runs. Default: {pairs}.")
    parser.add_argument("--json", action="store_true", help="Print JSON in place of a table.")
    return parser


def report(comparisons: list[Comparison], *, as_json: bool, faster: bool = False, peer: str = "peer") -> None:
    """Print a table, or JSON."""
    if as_json:
        print(json.dumps([dataclasses.asdict(comparison) for comparison in comparisons], indent=1))
        return
    title = "times as fast" if faster else f"ours / {peer}"
    print(f"{'':<44} {'nbdist':>9} {peer[:9]:>9} {'':<4} {title:<22} wanted")
    for comparison in comparisons:
        print(comparison.line(faster))
