"""How long is a step of a sharded model, or of a pipeline, on two ranks of a host? Beside data parallelism, or torch.

    python benchmarks/shard.py [--peer dp|fsdp] [--pairs 3] [--json] [CASE ...]

With `dp` the peer is nbdist's own data parallelism (`dp=2`), with the same model, data, batches and optimizer; the rows
with "pipeline" are `pp=2`. With `fsdp` it is the same loop written by hand with torchrun and torch's `fully_shard` over
gloo, each large module a unit of its own. One thread a rank; the first 20 steps are not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
from pairs import arguments, compare, report
from ranks import figures_of_ranks, on_a_rank, tell
from step_time import RANKS, WARM_UP, work
from torch import nn
from torch.nn import functional as F

# name: (case of `step_time`, mesh, steps, wanted)
CASES: dict[str, tuple[str, str, int, str]] = {
    "MLP 5 M, batch 512": ("MLP 5 M, batch 512", "shard=2", 30, "at most 1.3"),
    "char-GPT 0.82 M": ("char-GPT 0.82 M", "shard=2", 40, "at most 1.3"),
    "MLP 50 M": ("MLP 50 M", "shard=2", 8, "at most 1.6"),
    "MLP 50 M, pipeline": ("MLP 50 M", "pp=2", 8, "at most 2"),
}
SHARDED = [case for case in CASES if "pipeline" not in case]


def run_ours(case: str, mesh: str, steps: int) -> float:
    """Milliseconds a step with `nbdist.train` on a mesh."""
    import nbdist

    model, x, y, batch_size, _ = work(case)
    options: dict[str, Any] = {
        "loss": "cross_entropy", "lr": 1e-3, "batch_size": batch_size, "threads": 1, "device": "cpu",
        "verbose": False, "record": False, "strategy": mesh,
    }  # fmt: skip
    began: list[float] = []

    def step_begins(_optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(_optimizer, lambda step: began.append(time.perf_counter()) or 1.0)

    nbdist.train(model, (x, y), steps=WARM_UP + steps, lr_scheduler=step_begins, **options)
    return 1000 * statistics.median(b - a for a, b in zip(began[WARM_UP:], began[WARM_UP + 1 :], strict=False))


def run_fsdp(case: str, steps: int) -> float:
    """Milliseconds a step with a loop written by hand, with `fully_shard` over gloo."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, x, y, batch_size, _ = work(case)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    largest = sum(parameter.numel() for parameter in model.parameters()) // 8
    for module in list(model.modules())[:0:-1]:
        own = sum(parameter.numel() for parameter in module.parameters())
        if isinstance(module, (nn.Linear, nn.TransformerEncoderLayer)) and own > largest:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    began: list[float] = []
    while len(began) <= WARM_UP + steps:
        for batch in torch.randperm(len(x), generator=order).split(batch_size):
            began.append(time.perf_counter())
            rows = batch.tensor_split(RANKS)[dist.get_rank()]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return 1000 * statistics.median(b - a for a, b in zip(began[WARM_UP:], began[WARM_UP + 1 :], strict=False))


def main() -> None:
    """Measure the cases and print a table."""
    parser = arguments(__doc__, pairs=3)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Of {', '.join(CASES)}. Default: the peer's.")
    parser.add_argument("--peer", choices=("dp", "fsdp"), default="dp", help="Default: dp.")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if on_a_rank():
        case, mesh, steps, _ = CASES[options.cases[0]]
        if options.side == "fsdp":
            tell(run_fsdp(case, steps))
        else:
            tell(run_ours(case, "dp=2" if options.side == "dp" else mesh, steps))
        os._exit(0)  # gloo's own end aborts now and then, when all has been measured
    comparisons = [
        compare(
            case, "ms", CASES[case][3] if options.peer == "dp" else "",
            lambda case=case: float(figures_of_ranks(__file__, RANKS, "--side", "ours", case)),
            lambda case=case: float(figures_of_ranks(__file__, RANKS, "--side", options.peer, case)),
            options.pairs,
        )
        for case in options.cases or (list(CASES) if options.peer == "dp" else SHARDED)
    ]  # fmt: skip
    report(comparisons, as_json=options.json, peer="dp=2" if options.peer == "dp" else "FSDP2")


if __name__ == "__main__":
    main()
