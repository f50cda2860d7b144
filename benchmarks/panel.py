"""What do telemetry and the panel cost? Their share of all CPU-seconds of a training.

    python benchmarks/panel.py [--pairs 10] [--json]

The training of free_notebook.py, three times as long, in one kernel: each rank tells five times a second how far it is,
and the panel is drawn as often. The CPU time of two ranks that wait for each other varies by a tenth from run to run,
so that of telling is counted where it is spent: in the training thread of each rank, which tells, writes the record and
the board, less what the counting itself takes. What the kernel, the controller and the nannies spend is compared with
the same training silenced: no rank tells, nothing is drawn.
"""

from __future__ import annotations

import json
import re
import statistics

import psutil
from free_notebook import LINE, TASK, cpu_seconds
from free_notebook import STEPS as SHORT
from kernel import Kernel
from pairs import arguments

WANTED = 0.01
STEPS = 3 * SHORT
LONG = LINE.replace(f"--steps {SHORT}", f"--steps {STEPS}")
COUNT = """
import time
from nbdist.core.reporter import Reporter
real, told_s, empty_s = (Reporter.report_if_due, Reporter.add_totals), 0.0, 0.0
def counted(function):
    def count(*arguments):
        global told_s
        began_s = time.thread_time()
        function(*arguments)
        told_s += time.thread_time() - began_s - empty_s
    return count
def nothing(*arguments):
    pass
counting = counted(nothing)
for _ in range(10000):
    counting()
empty_s, told_s = told_s / 10000, 0.0
def silence(silent):
    given = [(lambda *none: None) if silent else counted(function) for function in real]
    Reporter.report_if_due, Reporter.add_totals = given
"""
DRAW = """
import nbdist
from nbdist.notebook.dashboard import PanelDashboard
_drawn = PanelDashboard.update
def undraw(silent):
    PanelDashboard.update = (lambda panel, run: None) if silent else _drawn
print("pids", *(engine.pid for engine in nbdist.current_cluster().engines))
"""


def told(kernel: Kernel) -> float:
    """CPU-seconds that all ranks have spent on telling so far."""
    return sum(map(float, re.findall(r"told ([\d.]+)", kernel.run("%%dist\nprint('told', told_s, 'on', rank)"))))


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=10).parse_args()
    figures = []
    with Kernel() as kernel:
        kernel.run("%dist_start -n 2 --device cpu\n" + TASK)
        pids = [int(pid) for pid in re.findall(r"\d+", kernel.run(DRAW))]
        kernel.run("%%dist\n" + COUNT)
        engines = [psutil.Process(pid) for pid in pids]
        for pair in range(options.pairs + 1):
            others: dict[bool, float] = {}
            ranks, telling = 0.0, 0.0
            for silent in (pair % 2 == 0, pair % 2 == 1):
                kernel.run(f"%%dist\nsilence({silent})")
                kernel.run(f"undraw({silent})")
                rest = [p for p in [kernel.process, *kernel.family()] if p.pid not in pids]
                before, engines_before, told_before = cpu_seconds(rest), cpu_seconds(engines), told(kernel)
                kernel.run(LONG)
                others[silent] = cpu_seconds(rest) - before
                if not silent:
                    ranks, telling = cpu_seconds(engines) - engines_before, told(kernel) - told_before
            if pair:  # the first one warms up
                all_s = ranks + others[False]
                figures.append({"telling": telling / all_s, "drawing": (others[False] - others[True]) / all_s,
                                "ms": 1000 * all_s / STEPS})  # fmt: skip
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for name in ("telling", "drawing"):
        shares = sorted(figure[name] for figure in figures)
        print(f"{name:<8} {statistics.median(shares):7.2%}   ({shares[0]:.2%} to {shares[-1]:.2%})")
    total = statistics.median(figure["telling"] + figure["drawing"] for figure in figures)
    step = statistics.median(figure["ms"] for figure in figures)
    print(f"together {total:7.2%} of {step:.2f} CPU-milliseconds a step; wanted: below {WANTED:.0%}")


if __name__ == "__main__":
    main()
