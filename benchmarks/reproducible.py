"""What does `reproducible` cost a step? Beside the same training without it.

    python benchmarks/reproducible.py [--pairs 12] [--json] [CASE ...]

On two ranks, one thread each, AdamW. Every batch is computed in four slices, or twelve, in place of two, so it costs
what small slices cost: the less, the more there is to compute in each. Both sides run in the same processes in turn.
"""

from __future__ import annotations

from pairs import Comparison, arguments, report, with_and_without
from ranks import figures_of_ranks, on_a_rank, tell
from step_time import RANKS, CharGPT, cnn, mlp

# name: (model, shape of a sample, classes, batch size, steps, slices)
CASES = {
    "char-GPT 0.82 M, batch 96": (CharGPT, (64,), 96, 96, 8, 4),
    "char-GPT 0.82 M, batch 32": (CharGPT, (64,), 96, 32, 16, 4),
    "CNN 25 k, batch 384": (cnn, (3, 32, 32), 10, 384, 12, 4),
    "CNN 25 k, batch 64": (cnn, (3, 32, 32), 10, 64, 60, 4),
    "MLP 5 M, batch 1536": (lambda: mlp(512, 1536, 2400, 200), (512,), 200, 1536, 6, 4),
    "MLP 5 M, batch 512": (lambda: mlp(512, 1536, 2400, 200), (512,), 200, 512, 12, 4),
    "MLP 0.67 M, batch 768": (lambda: mlp(256, 512, 768, 200), (256,), 200, 768, 40, 4),
    "char-GPT 0.82 M, batch 32, twelve slices": (CharGPT, (64,), 96, 32, 16, 12),
    "MLP 5 M, batch 512, twelve slices": (lambda: mlp(512, 1536, 2400, 200), (512,), 200, 512, 12, 12),
}


def measure(case: str, pairs: int) -> list[tuple[float, float]]:
    """Milliseconds a step with and without, by pair. Runs on each rank."""
    import torch

    from nbdist.core.comm.world import World
    from nbdist.core.task.task import Task
    from nbdist.core.train import fit
    from nbdist.plan import Plan

    make, shape, classes, batch_size, steps, slices = CASES[case]
    torch.manual_seed(0)
    if make is CharGPT:
        x, y = torch.randint(classes, (4 * batch_size, *shape)), torch.randint(classes, (4 * batch_size, *shape))
    else:
        x, y = torch.randn(4 * batch_size, *shape), torch.randint(classes, (4 * batch_size,))
    with World.from_environment("cpu") as world:

        def milliseconds(reproducible: bool) -> float:
            task = Task.create(make(), (x, y), loss="cross_entropy", optimizer="adamw", lr=1e-3, batch_size=batch_size)
            plan = Plan.create(
                ranks=world.size,
                cores=world.size,
                steps=steps,
                reproducible=slices if reproducible else None,
                **task.options,
            )
            return 1000 * float(fit(task, plan, world).history[0]["seconds"]) / steps

        milliseconds(False), milliseconds(True)
        return with_and_without(milliseconds, pairs)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__, pairs=12)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Of: {', '.join(CASES)}. Default: all.")
    options = parser.parse_args()
    if on_a_rank():
        tell(measure(options.cases[0], options.pairs))
        return
    comparisons = []
    for case in options.cases or CASES:
        figures = figures_of_ranks(__file__, RANKS, "--pairs", str(options.pairs), case)
        ours, bare = (list(side) for side in zip(*figures, strict=True))
        comparisons.append(Comparison(name=case, unit="ms", ours=ours, peer=bare, target="at most 1.15"))
    report(comparisons, as_json=options.json, peer="without")


if __name__ == "__main__":
    main()
