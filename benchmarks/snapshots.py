"""What do the snapshots of a training in memory cost a step? Beside the same training without them.

    python benchmarks/snapshots.py [--pairs 20] [--json]

The character GPT of step_time.py on two ranks, one thread each. Both sides run in the same processes in turn, for a few
seconds each, so that a drift of the machine meets both. Every run begins anew: its first snapshots touch new pages.
"""

from __future__ import annotations

import json

from pairs import Comparison, arguments, report, with_and_without
from ranks import figures_of_ranks, on_a_rank, tell
from step_time import RANKS, work

CASE = "char-GPT 0.82 M"
STEPS = 40


def measure(pairs: int) -> list[tuple[float, float]]:
    """Milliseconds a step with and without snapshots, by pair. Runs on each rank."""
    from nbdist.core.comm.world import World
    from nbdist.core.state.snapshot import SnapshotStore
    from nbdist.core.task.task import Task
    from nbdist.core.train import fit
    from nbdist.plan import Plan

    with World.from_environment("cpu") as world:

        def milliseconds(kept: bool) -> float:
            model, x, y, batch_size, _ = work(CASE)
            task = Task.create(model, (x, y), loss="cross_entropy", optimizer="adamw", lr=1e-3, batch_size=batch_size)
            plan = Plan.create(ranks=world.size, cores=world.size, steps=STEPS, **task.options)
            own = SnapshotStore(world.size) if kept and world.rank == 0 else None  # held outside of the ranks, else
            told = json.dumps([] if own is None else own.paths).encode()
            result = fit(task, plan, world, snapshot_paths=json.loads(world.channel().broadcast_bytes(told)))
            if own is not None:
                own.close()
            return 1000 * float(result.history[0]["seconds"]) / STEPS

        milliseconds(False)
        return with_and_without(milliseconds, pairs)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, pairs=20)
    options = parser.parse_args()
    if on_a_rank():
        tell(measure(options.pairs))
        return
    figures = figures_of_ranks(__file__, RANKS, "--pairs", str(options.pairs))
    kept, bare = (list(side) for side in zip(*figures, strict=True))
    comparison = Comparison(name=CASE, unit="ms", ours=kept, peer=bare, target="at most 1.02")
    report([comparison], as_json=options.json, peer="without")
    if not options.json:
        low, high = comparison.interval()
        print(f"median ratio between {low:.3f} and {high:.3f} (95 %)")


if __name__ == "__main__":
    main()
