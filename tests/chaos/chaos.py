"""The chaos suite: after any failure of its processes, a run ends with the numbers of an undisturbed one.

    python tests/chaos/chaos.py [--seed N] [--only WORDS] [--channel shared|group|meshes|none] [--device cuda] [--write]

``make chaos`` runs it whole and puts its table into tests/README.md; `test_chaos.py` runs a part of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import meshes
import outside
import scenarios
from lab import RANKS, Lab, Trial
from shared_cluster import MARK

CHANNELS = {"shared": "shared memory", "group": "process group"}
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- chaos: written by make chaos -->", "<!-- end of chaos -->"


@dataclasses.dataclass
class Row:
    """The trials of one event.

    Args:
        event: What happened.
        where: On which channel.
    """

    event: str
    where: str
    trials: list[Trial] = dataclasses.field(default_factory=list)

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.problem]

    @property
    def seconds(self) -> list[float]:
        return sorted(seconds for trial in self.trials for seconds in trial.seconds)

    def cells(self) -> list[str]:
        """Its cells in the table."""
        times = ["–", "–"]  # nothing to wait for
        if self.seconds:
            rank = math.ceil(0.99 * len(self.seconds)) - 1
            times = [f"{statistics.median(self.seconds):.2f}", f"{self.seconds[rank]:.2f}"]
        equal = len(self.trials) - len(self.failed)
        return [self.event, self.where, str(len(self.trials)), str(equal), *times]


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    head = ["event", "channel or mesh", "runs", "equal", "p50, s", "p99, s"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_lab(
    channel: str,
    ranks: int,
    events: dict[tuple[str, str], scenarios.Scenario],
    workloads: Iterable[str],
    seed: int,
    device: str,
    report,
) -> list[Row]:
    """Events on one cluster.

    Args:
        channel: Of the cluster.
        ranks: How many it has.
        events: The scenarios, by event name and channel or mesh.
        workloads: The workloads.
        seed: Of all that is random.
        device: The device of its ranks.
        report: Called with the results as text.
    """
    rows = []
    lab = Lab(channel, ranks=ranks, device=device)
    try:
        for workload in workloads:
            lab.reference(workload)
        lab.survives(next(iter(workloads)), ("updated", 0, 3))
        lab.begin_watching()
        for (event, where), scenario in events.items():
            row, started_s = Row(event, where), time.monotonic()
            rows.append(row)
            for trial in scenario(lab, random.Random(f"{seed} {event}")):
                row.trials.append(trial)
                if trial.problem:
                    report(f"  {event}, {where}, run {len(row.trials)}: {trial.problem}")
            if left := lab.left_behind():
                row.trials[-1] = Trial(problem=left)
                report(f"  {event}, {where}: {left}")
            report(f"{' | '.join(row.cells())} | {time.monotonic() - started_s:.0f} s")
    finally:
        lab.close()
    return rows


def in_own_clusters(seed: int, only: str, report) -> list[Row]:
    """The events that need their own cluster, or machine."""
    rows: dict[tuple[str, str], Row] = {}
    for name, scenario in outside.SCENARIOS.items():
        if only not in name:
            continue
        for key, trial in scenario(random.Random(f"{seed} {name}")):
            row = rows.setdefault(key, Row(*key))
            row.trials.append(trial)
            if trial.problem:
                report(f"  {row.event}, run {len(row.trials)}: {trial.problem}")
        report(f"{name}: {' | '.join(cell for row in rows.values() for cell in row.cells())}")
    return list(rows.values())


def write(rows: list[Row], minutes: float) -> None:
    """Put the table into the README of the tests."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    runs, failed = sum(len(row.trials) for row in rows), sum(len(row.failed) for row in rows)
    words = f"{runs} runs, {failed} of them not equal, {minutes:.0f} minutes on {os.cpu_count()} cores."
    README.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{words}\n\n{END}{after}")


def main() -> int:
    """Run the selected events; returns how many trials failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="Of all that is random.")
    parser.add_argument("--only", default="", metavar="WORDS", help="Events whose name holds these words.")
    parser.add_argument("--channel", choices=[*CHANNELS, "meshes", "none"], help="By default all.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="What ranks compute on. Default: cpu.")
    parser.add_argument("--write", action="store_true", help="Put the table into tests/README.md.")
    options = parser.parse_args()
    started_s = time.monotonic()
    os.environ[MARK] = str(os.getpid())
    warnings.filterwarnings("ignore", module="nbdist")
    rows: list[Row] = []

    def report(text: str) -> None:
        print(f"{time.monotonic() - started_s:6.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
        os.environ["NBDIST_HOME"] = f"{temporary}/home"
        on_gpu = options.device == "cuda"
        for word, channel in {"group": "gloo on a GPU"}.items() if on_gpu else CHANNELS.items():
            events = {**scenarios.LOST, **scenarios.COMMANDED}
            wanted = {(event, channel): events[event] for event in events if options.only in event}
            if wanted and options.channel in (None, word):
                rows += in_lab(
                    channel, RANKS, wanted, (*scenarios.WORKLOADS, "30 MiB"), options.seed, options.device, report
                )
        if options.channel in (None, "meshes"):
            wanted = {
                (event, mesh): scenario
                for mesh in meshes.MESHES
                for event, scenario in meshes.events_of(mesh).items()
                if options.only in f"{event} {mesh}"
            }
            if wanted:
                there = dict.fromkeys(mesh for _, mesh in wanted)
                rows += in_lab("shared memory", meshes.RANKS, wanted, there, options.seed, options.device, report)
        if options.channel in (None, "none") and not on_gpu:
            rows += in_own_clusters(options.seed, options.only, report)
        tempfile.tempdir = None
    if not rows:
        parser.error(f"no event's name holds {options.only!r}.")
    minutes = (time.monotonic() - started_s) / 60
    failed = sum(len(row.failed) for row in rows)
    print(f"\n{table(rows)}\n\n{sum(len(r.trials) for r in rows)} runs, {failed} not equal, {minutes:.1f} minutes")
    if options.write:
        write(rows, minutes)
    return failed


if __name__ == "__main__":
    raise SystemExit(main() > 0)
