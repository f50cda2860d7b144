"""How long do 100 MB of weights take to the engines, and back? Beside one copy of the same bytes.

    python benchmarks/hand_over.py [--pairs 9] [--json]

A model of 100 MB is pushed to 1, 2 and 4 engines, until each of them has read a byte of every page of it, and pulled
back. The peer copies the same bytes into fresh pages. A training reuses its segments: `again` is the packing of the
same model into a segment that came back, as from the second `%dist_train` on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from pairs import Comparison, arguments, report

import nbdist
from nbdist.core.transfer.payload import SegmentCache, pack

BYTES = 100_000_000
ENGINES = (1, 2, 4)


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=9).parse_args()
    weights = torch.randn(BYTES // 4)
    segment_cache = SegmentCache()

    def copy() -> float:
        return 1000 * seconds(weights.clone)

    def again() -> None:
        _, segment = pack({"weights": weights}, segment_cache=segment_cache)
        segment_cache.recycle(segment, lambda: True)

    comparisons = []
    for engines in ENGINES:
        there, back, peer = [], [], []
        with nbdist.Cluster(engines, device="cpu") as cluster:
            for _ in range(options.pairs):
                cluster.execute("weights = None").wait()  # freeing the last ones is not what is measured
                there.append(1000 * seconds(lambda: cluster.push(weights=weights)))
                cluster.execute("assert weights[::1024].sum() is not None").wait()
                back.append(1000 * seconds(lambda: cluster.pull("weights")))
                peer.append(copy())
        name, target = f"{engines} engine{'s' if engines > 1 else ''}", "at most 2"
        comparisons += [
            Comparison(name=f"100 MB to {name}", unit="ms", ours=there, peer=peer, target=target),
            Comparison(name=f"and back from one of {name}", unit="ms", ours=back, peer=peer, target=target),
        ]
    again()
    ours, peer = zip(*[(1000 * seconds(again), copy()) for _ in range(options.pairs)], strict=True)
    comparisons.append(
        Comparison(name="packed again, for any number", unit="ms", ours=list(ours), peer=list(peer), target="")
    )
    report(comparisons, as_json=options.json, peer="one copy")


if __name__ == "__main__":
    main()
