"""What does the training loop itself cost? One rank beside the plain loop in one process, one thread each.

    python benchmarks/one_rank.py [--device cpu|cuda] [--pairs 5] [--json] [CASE ...]

Two tables: milliseconds a step, and operators a step that torch dispatches below autograd, backward and optimizer
included. Operators are counted, not measured: their number is the same on every machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import step_time
from pairs import Comparison, arguments, compare, report
from torch.utils._python_dispatch import TorchDispatchMode

CASES = ("MLP 6 k", "CNN 25 k", "char-GPT 0.82 M")
WANTED_SHARE, WANTED_OPERATORS = "at least 0.81", "at most 1.2"
SIDES: dict[str, Callable[..., float]] = {"ours": step_time.run_ours, "peer": step_time.run_peer}


class Counter(TorchDispatchMode):
    """Counts dispatched operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run one."""
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators(side: str, case: str, device: str) -> float:
    """Operators a step: what more steps need more, so that neither start nor end of a run counts."""
    counts = []
    for steps in (10, 30):
        with Counter() as counter:
            SIDES[side](case, device, steps)
        counts.append(counter.count)
    return (counts[1] - counts[0]) / 20


def measure(what: str, side: str, case: str, device: str) -> float:
    """A figure of one side, from a fresh process."""
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--what", what, "--side", side, "--device", device, case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("figure ")).split()[1])


def beside(what: str, case: str, pairs: int, device: str = "cpu") -> Comparison:
    """Compare one case with the plain loop, "ms" or "operators"."""
    wanted = WANTED_OPERATORS if what == "operators" else WANTED_SHARE if device == "cpu" else "at least 0.95"
    return compare(
        case, what[:3], wanted,
        lambda: measure(what, "ours", case, device), lambda: measure(what, "peer", case, device), pairs,
    )  # fmt: skip


def main() -> None:
    """Measure the cases and print both tables."""
    parser = arguments(__doc__, pairs=5)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Default: {', '.join(CASES)}.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Default: cpu.")
    parser.add_argument("--what", choices=("ms", "operators"), help="Default: both.")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, case = options.side, options.cases[0]
        figure = SIDES[side](case, options.device) if options.what == "ms" else operators(side, case, options.device)
        print("figure", figure)
        return
    cases = options.cases or CASES
    if options.what != "operators":
        steps = [beside("ms", case, options.pairs, options.device) for case in cases]
        report(steps, as_json=options.json, faster=True, peer="plain")
    if options.what != "ms":
        report([beside("operators", case, 1, options.device) for case in cases], as_json=options.json, peer="plain")


if __name__ == "__main__":
    main()
