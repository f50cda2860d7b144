"""How long is a step? Data parallelism on two ranks, beside the same loop written by hand with DDP over gloo.

    python benchmarks/step_time.py [--pairs 5] [--json] [CASE ...]

Both sides run under torchrun with one thread a rank, on the same model, data and batches, in turn: ours, theirs, ours,
theirs. The first 20 steps are not counted. The ratio is taken pair by pair, so a machine whose speed drifts does not
decide it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

RANKS = 2
WARM_UP = 20


class CharGPT(nn.Module):
    """A character model of 0.87 M parameters."""

    def __init__(self, vocabulary: int = 96, width: int = 128, layers: int = 4, length: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.scores = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores ``(batch, vocabulary, length)`` for characters ``(batch, length)``."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.blocks(self.characters(x) + self.places, mask=mask, is_causal=True)
        return self.scores(hidden).transpose(1, 2)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """Two convolutions and a linear layer on images of 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip


# name: (model, shape of a sample, classes, samples, global batch size, steps)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int, int]] = {
    "MLP 6 k": (lambda: mlp(64, 64, 20), (64,), 20, 4096, 128, 400),
    "MLP 0.67 M": (lambda: mlp(256, 512, 768, 200), (256,), 200, 4096, 256, 150),
    "CNN 25 k": (cnn, (3, 32, 32), 10, 2048, 64, 100),
    "char-GPT 0.82 M": (CharGPT, (64,), 96, 1024, 32, 40),
    "MLP 50 M": (lambda: mlp(2048, 8192, 4000, 100), (2048,), 100, 512, 64, 8),
}


def work(case: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, int, int]:
    """Model, inputs, targets, batch size and steps of a case; the same numbers on every rank and side."""
    make, shape, classes, samples, batch_size, steps = CASES[case]
    torch.manual_seed(0)
    if make is CharGPT:
        x = torch.randint(0, classes, (samples, *shape))
        return make(), x, x.roll(-1, 1), batch_size, steps
    return make(), torch.randn(samples, *shape), torch.randint(0, classes, (samples,)), batch_size, steps


def run_ours(case: str) -> float:
    """Milliseconds a step with `nbdist.train`."""
    import nbdist

    model, x, y, batch_size, steps = work(case)
    options: dict[str, Any] = {"loss": "cross_entropy", "lr": 1e-3, "batch_size": batch_size, "threads": 1}
    quiet = {"verbose": False, "record": False}
    nbdist.train(model, (x, y), steps=WARM_UP, **options, **quiet)
    result = nbdist.train(model, (x, y), steps=steps, **options, **quiet)
    return 1000 * float(result.history[0]["seconds"]) / steps


def run_peer(case: str) -> float:
    """Milliseconds a step with a loop as a good engineer writes it: DDP, gloo on loopback, vectorised batches."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, x, y, batch_size, steps = work(case)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)

    def train(steps: int) -> None:
        done = 0
        while done < steps:
            for batch in torch.randperm(len(x), generator=order).split(batch_size):
                rows = batch.tensor_split(RANKS)[dist.get_rank()]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(replica(x[rows]), y[rows]).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    return

    train(WARM_UP)
    started_s = time.perf_counter()
    train(steps)
    return 1000 * (time.perf_counter() - started_s) / steps


def measure(side: str, case: str) -> float:
    """Run one side of a case in fresh processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [*command, "--side", side, case], capture_output=True, text=True, check=True, env=environment
    )  # fmt: skip
    return float(next(line for line in done.stdout.splitlines() if line.startswith("ms ")).split()[1])


def main() -> None:
    """Measure the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Of {', '.join(CASES)}. Default: all.")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="Pairs of runs a case. Default: 5.")
    parser.add_argument("--json", action="store_true", help="Print JSON in place of the table.")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        milliseconds = (run_ours if arguments.side == "ours" else run_peer)(arguments.cases[0])
        if os.environ["RANK"] == "0":
            print("ms", milliseconds, flush=True)
        os._exit(0)  # DDP's own end over gloo aborts now and then, when all has been measured
    rows = []
    for case in arguments.cases or CASES:
        pairs = [(measure("ours", case), measure("peer", case)) for _ in range(arguments.pairs)]
        ratios = sorted(peer / ours for ours, peer in pairs)
        ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
        rows.append({"case": case, "ours_ms": ours, "peer_ms": peer, "ratios": ratios})
        if not arguments.json:
            spread = f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"{case:<16}  ours {ours:8.2f} ms   DDP {peer:8.2f} ms   times as fast: {spread}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
