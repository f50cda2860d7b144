"""What has become slower? A few figures of the other scripts, beside those that stand in README.md.

    python benchmarks/quick.py

Only ratios are compared: each is to a peer that is measured in turn in the same run, so another machine, or one that
is busy, changes both sides. A figure is worse when the median of its pairs lies beyond all pairs that README.md tells
of, and does so once more when it is measured again at once. This says so then, one line each, and ends with status 1.
Where ours are more processes than the peer's, other work slows them more: a busy machine is named beside the verdict.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import first_step
import free_notebook
import start_up
import step_time
from pairs import Comparison

from nbdist.plan import available_cores

README = Path(__file__).parent / "README.md"
PAIRS = 5


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of README.md.

    Args:
        script: In the heading of its section.
        peer: What its ratios are to.
        measure: Answers it anew, with so many pairs.
        faster: Whether the section says how many times as fast we are: more is better.
    """

    script: str
    peer: str
    measure: Callable[[int], list[Comparison]]
    faster: bool = False


def _small_step(pairs: int) -> list[Comparison]:
    return [step_time.beside("ddp", "MLP 6 k", pairs)]


def _notebook(pairs: int) -> list[Comparison]:
    return [free_notebook.measure_a_second(pairs)]


QUESTIONS = [
    Question(script="start_up.py", peer="import torch", measure=start_up.measure),
    Question(script="first_step.py", peer="notebook_launcher", measure=first_step.measure),
    Question(script="step_time.py", peer="DDP", measure=_small_step, faster=True),
    Question(script="free_notebook.py", peer="import torch", measure=_notebook),
]


def told(question: Question, name: str) -> tuple[float, float, float]:
    """Median, least and most of the pairs that README.md tells of, as they stand there."""
    section = README.read_text().partition(f"(`{question.script}`)")[2].partition("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("|") and line.split("|")[1].replace("`", "").strip() == name:
            found = re.search(r"([\d.]+)\** ?\(([\d.]+) to ([\d.]+)\)", line)
            if found:
                return float(found[1]), float(found[2]), float(found[3])
    sys.exit(f"{README}: the section of {question.script} has no row {name!r} with a median, (least to most).")


def is_worse(question: Question, comparison: Comparison) -> bool:
    """Whether the median of the pairs lies beyond all that README.md tells of."""
    _, least, most = told(question, comparison.name)
    median = statistics.median(comparison.ratios)
    return 1 / median < least if question.faster else median > most


def answer(question: Question) -> list[str]:
    """Measure and print what a question asks; returns what is worse."""
    found = question.measure(PAIRS)
    if any(is_worse(question, comparison) for comparison in found):
        print(f"... {question.script}: measured once more", flush=True)
        again = {comparison.name: comparison for comparison in question.measure(PAIRS)}
        found = [again[old.name] if is_worse(question, old) else old for old in found]
    worse = []
    for comparison in found:
        median, least, most = told(question, comparison.name)
        unit = "times as fast as" if question.faster else "of"
        beside = f"{median:g} ({least:g} to {most:g}) {unit} {question.peer}"
        print(replace(comparison, target=beside).line(question.faster), flush=True)
        if is_worse(question, comparison):
            now = statistics.median(comparison.ratios)
            now = 1 / now if question.faster else now
            worse.append(f"worse: {comparison.name} ({question.script}): {now:.3g}, where README.md has {beside}")
    return worse


def main() -> None:
    """Ask every question, and say what has become worse."""
    load, cores = os.getloadavg()[0], available_cores()
    print(f"{'':<44} {'nbdist':>9} {'peer':>9} {'':<4} {'ratio':<22} in README.md")
    worse = [line for question in QUESTIONS for line in answer(question)]
    print(*worse, sep="\n", end="\n" if worse else "")
    if worse and load > cores / 2:
        print(f"the machine was busy before this began (load {load:.1f} on {cores} cores): run it again when it is not")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
