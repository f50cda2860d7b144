"""What do telemetry and the panel cost? CPU-seconds a step, beside the same training with both silenced.

    python benchmarks/panel.py [--pairs 20] [--json]

The training of free_notebook.py in one kernel, run in turn as it is (each rank tells ten times a second how far it is,
and the panel is drawn as often) and silenced: no rank measures or tells, nothing is drawn. Counted is the CPU time of
every process: the kernel, the controller, the engines and their nannies.
"""

from __future__ import annotations

from free_notebook import LINE, STEPS, TASK, spent
from kernel import Kernel
from pairs import Comparison, arguments, report

SWITCH = """
from nbdist.core.reporter import Reporter
_told = _told if "_told" in globals() else (Reporter.tell_if_due, Reporter.hear)
def silence(silent):
    nothing = lambda *arguments: None
    Reporter.tell_if_due, Reporter.hear = (nothing, nothing) if silent else _told
"""
DRAWING = """
from nbdist.notebook.dashboard import PanelDashboard
_drawn = PanelDashboard.update
def undraw(silent):
    PanelDashboard.update = (lambda panel, run: None) if silent else _drawn
"""


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=20).parse_args()
    sides: dict[bool, list[float]] = {False: [], True: []}
    with Kernel() as kernel:
        kernel.run("%dist_start -n 2 --device cpu\n" + TASK + DRAWING)
        kernel.run("%%dist\n" + SWITCH)
        for pair in range(options.pairs + 1):
            for silent in (pair % 2 == 0, pair % 2 == 1):
                kernel.run(f"%%dist\nsilence({silent})")
                kernel.run(f"undraw({silent})")
                processes = [kernel.process, *kernel.family()]
                before = spent(processes)
                kernel.run(LINE)
                if pair:  # the first one warms up
                    sides[silent].append(1000 * (spent(processes) - before) / STEPS)
    found = Comparison(
        name="CPU-milliseconds a step", unit="ms", ours=sides[False], peer=sides[True], target="at most 1.01"
    )
    report([found], as_json=options.json, peer="silenced")
    if not options.json:
        low, high = found.interval()
        print(f"the median lies between {low:.3f} and {high:.3f} (95 %, {options.pairs} pairs)")


if __name__ == "__main__":
    main()
