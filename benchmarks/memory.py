"""How much memory do four idle engines take? Beside one process that has imported torch.

    python benchmarks/memory.py [--pairs 3] [--json]

Ours is the sum of the proportional set sizes (PSS: a page that n processes share counts 1/n for each) of every process
that `%dist_start -n 4` leaves: fork server, controller, engines and their nannies. The peer's is its resident set.
"""

from __future__ import annotations

import subprocess
import sys

from kernel import Kernel
from pairs import arguments, compare, report

MIB = 2**20


def engines() -> float:
    """MiB of four idle engines and all that belongs to them."""
    with Kernel() as kernel:
        kernel.run("%dist_start -n 4 --device cpu")
        return sum(process.memory_full_info().pss for process in kernel.family()) / MIB


def one_torch() -> float:
    """MiB of one process with torch imported."""
    code = "import torch, psutil; print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout) / MIB


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=3).parse_args()
    found = compare("4 idle engines, all processes", "MiB", "at most 2", engines, one_torch, options.pairs)
    report([found], as_json=options.json, peer="one torch")


if __name__ == "__main__":
    main()
