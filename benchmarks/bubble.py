"""How long the ranks of a pipeline wait, measured, for each schedule, beside (p - 1) / (m + p - 1)."""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

import nbdist
from nbdist.plan.plan import SCHEDULES

WIDTH, LAYERS, ROWS = 768, 8, 64


class Block(nn.Module):
    """One of many that take equally long."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A residual layer."""
        return x + self.layer(x).tanh()


def measure(cluster: nbdist.Cluster, schedule: str, microbatches: int) -> tuple[float, float]:
    """Idle share and milliseconds of a step: the eighth of a run."""
    model = nn.Sequential(*(Block() for _ in range(LAYERS)))
    x = torch.randn(8 * ROWS * microbatches, WIDTH)
    run = cluster.train(
        model, (x, x), loss="mse", optimizer="sgd", lr=1e-3, strategy="pipeline", schedule=schedule,
        microbatches=microbatches, batch_size=ROWS * microbatches, steps=8,
    )  # fmt: skip
    timeline = run.timeline()
    return timeline.idle, timeline.span_s * 1e3


def main() -> None:
    """Print the table and one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=2, help="Ranks. Default: 2.")
    parser.add_argument("--repeats", type=int, default=5, help="Runs a cell, interleaved. Default: 5.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(schedule, m) for schedule in SCHEDULES for m in (2, 4, 8)]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {cell: [] for cell in cells}
    with nbdist.Cluster(engines=arguments.n, device="cpu") as cluster:
        for _ in range(arguments.repeats):
            for cell in cells:
                found[cell].append(measure(cluster, *cell))
        measure(cluster, "1f1b", 4)
        picture = nbdist.last_run()
        print(
            f"{arguments.n} ranks, microbatches of {ROWS}, {LAYERS} equal blocks of {WIDTH} x {WIDTH}; median (spread)"
        )
        print(f"{'schedule':12}  m   formula   idle               step")
        for schedule, m in cells:
            idles = [idle for idle, _ in found[schedule, m]]
            spans = [span for _, span in found[schedule, m]]
            stages = SCHEDULES[schedule]
            formula = (arguments.n - 1) / (stages * m + arguments.n - 1)
            idle = f"{statistics.median(idles):5.0%} ({min(idles):.0%}-{max(idles):.0%})"
            print(f"{schedule:12} {m:2}   {formula:6.0%}   {idle:16} {statistics.median(spans):7.1f} ms")
        assert picture is not None
        print(picture.timeline())


if __name__ == "__main__":
    main()
