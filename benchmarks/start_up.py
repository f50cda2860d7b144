"""How long does `%dist_start -n 4` take? Beside one `python -c "import torch"`.

    python benchmarks/start_up.py [--pairs 5] [--json]

Cold: in a fresh kernel that has loaded nothing but nbdist, until four engines and the kernel have imported torch and
the engines have summed a tensor. Warm: once more in the same kernel, after `%dist_stop`. And `%load_ext nbdist` itself.
"""

from __future__ import annotations

import subprocess
import sys
import time

from kernel import Kernel
from pairs import Comparison, arguments, report

START = "%dist_start -n 4 --device cpu"


def import_torch() -> float:
    """Seconds of one Python that imports torch."""
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started_s


def measure(pairs: int) -> list[Comparison]:
    """Loading the extension, a cold start and a warm one, each beside the same imports of torch."""
    loading, cold, warm, peer = [], [], [], []
    import_torch()
    for _ in range(pairs):
        with Kernel() as kernel:
            loading.append(kernel.loading_s)
            cold.append(kernel.seconds(START))
            kernel.run("%dist_stop")
            warm.append(kernel.seconds(START))
        peer.append(import_torch())
    return [
        Comparison(name="%load_ext nbdist", unit="s", ours=loading, peer=peer, target=""),
        Comparison(name="%dist_start, cold", unit="s", ours=cold, peer=peer, target="at most 1.6"),
        Comparison(name="%dist_start, warm", unit="s", ours=warm, peer=peer, target="at most 0.5"),
    ]


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=7).parse_args()
    report(measure(options.pairs), as_json=options.json, peer="import")


if __name__ == "__main__":
    main()
