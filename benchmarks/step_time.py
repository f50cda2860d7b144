"""How long is a step of data parallelism on two ranks? Beside two peers.

    python benchmarks/step_time.py [--peer ddp|one] [--device cpu|cuda] [--pairs 4] [--json] [CASE ...]

`ddp` is the same loop written by hand with torchrun, DistributedDataParallel and gloo; both sides have one thread a
rank. `one` is the plain loop in one process that has all cores. Both sides have the same model, data, batches and fused
AdamW. The first 20 steps are not counted. With `--device cuda` there is a rank a GPU on both sides, over nccl; with one
GPU that is the plain loop again, whose data lies on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from pairs import Comparison, arguments, compare, report
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


# name: (model, shape of a sample, classes, samples, global batch size, steps, wanted)
Case = tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int, int, float]
BESIDE_DDP: dict[str, Case] = {
    "MLP 6 k": (lambda: mlp(64, 64, 20), (64,), 20, 4096, 128, 600, 2.5),
    "MLP 0.67 M": (lambda: mlp(256, 512, 768, 200), (256,), 200, 4096, 256, 200, 1.8),
    "CNN 25 k": (cnn, (3, 32, 32), 10, 2048, 64, 150, 1.2),
    "char-GPT 0.82 M": (CharGPT, (64,), 96, 1024, 32, 40, 1.0),
    "MLP 50 M": (lambda: mlp(2048, 8192, 4000, 100), (2048,), 100, 512, 64, 8, 1.0),
}
BESIDE_ONE: dict[str, Case] = {
    "MLP 0.67 M, batch 128": (lambda: mlp(256, 512, 768, 200), (256,), 200, 4096, 128, 250, 1.0),
    "MLP 0.67 M, batch 256": (lambda: mlp(256, 512, 768, 200), (256,), 200, 4096, 256, 200, 1.0),
    "MLP 2 M, batch 256": (lambda: mlp(256, 1024, 1500, 200), (256,), 200, 4096, 256, 100, 1.0),
    "MLP 5 M, batch 128": (lambda: mlp(512, 1536, 2400, 200), (512,), 200, 2048, 128, 60, 1.0),
    "MLP 5 M, batch 512": (lambda: mlp(512, 1536, 2400, 200), (512,), 200, 2048, 512, 30, 1.0),
}
CASES = BESIDE_DDP | BESIDE_ONE


def work(case: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, int, int]:
    """Model, inputs, targets, batch size and steps of a case; the same numbers on every rank and side."""
    make, shape, classes, samples, batch_size, steps, _ = CASES[case]
    torch.manual_seed(0)
    if make is CharGPT:
        x = torch.randint(0, classes, (samples, *shape))
        return make(), x, x.roll(-1, 1), batch_size, steps
    return make(), torch.randn(samples, *shape), torch.randint(0, classes, (samples,)), batch_size, steps


def run_ours(case: str, device: str, steps: int = 0) -> float:
    """Milliseconds a step with `nbdist.train`; of so many steps, by default those of the case."""
    import nbdist

    model, x, y, batch_size, default = work(case)
    steps = steps or default
    options: dict[str, Any] = {
        "loss": "cross_entropy", "lr": 1e-3, "batch_size": batch_size, "threads": 1, "device": device
    }  # fmt: skip
    quiet = {"verbose": False, "record": False}
    nbdist.train(model, (x, y), steps=WARM_UP, **options, **quiet)
    result = nbdist.train(model, (x, y), steps=steps, **options, **quiet)
    return 1000 * float(result.history[0]["seconds"]) / steps


def run_peer(case: str, device: str, steps: int = 0) -> float:
    """Milliseconds a step with a loop as a good engineer writes it; under torchrun with DDP, on CPUs over loopback."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model, x, y, batch_size, default = work(case)
    steps = steps or default
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(rank)
        model, x, y = model.cuda(), x.cuda(), y.cuda()
    replica: nn.Module = model
    if ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        torch.set_num_threads(1)
        replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3, fused=True)
    order = torch.Generator().manual_seed(0)

    def train(steps: int) -> None:
        done = 0
        while done < steps:
            for batch in torch.randperm(len(x), generator=order).split(batch_size):
                rows = batch.tensor_split(ranks)[rank]
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(replica(x[rows]), y[rows]).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
        if device == "cuda":
            torch.cuda.synchronize()

    train(WARM_UP)
    started_s = time.perf_counter()
    train(steps)
    return 1000 * (time.perf_counter() - started_s) / steps


def measure(side: str, case: str, ranks: int, device: str) -> float:
    """Run one side of a case in fresh processes."""
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable]
    if ranks > 1:
        environment["OMP_NUM_THREADS"] = "1"
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--side", side, "--device", device, case]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("ms ")).split()[1])


def beside(peer: str, case: str, pairs: int, device: str = "cpu") -> Comparison:
    """Compare one case with a peer, "ddp" or "one"."""
    ranks = RANKS if device == "cpu" else torch.cuda.device_count()
    return compare(
        case, "ms", f"at least {CASES[case][-1]:g}" if device == "cpu" else "",
        lambda: measure("ours", case, ranks, device),
        lambda: measure("peer", case, ranks if peer == "ddp" else 1, device),
        pairs,
    )  # fmt: skip


def main() -> None:
    """Measure the cases and print a table."""
    parser = arguments(__doc__, pairs=4)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Of {', '.join(CASES)}. Default: the peer's.")
    parser.add_argument("--peer", choices=("ddp", "one"), default="ddp", help="Default: ddp.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Default: cpu.")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        milliseconds = (run_ours if options.side == "ours" else run_peer)(options.cases[0], options.device)
        if os.environ.get("RANK", "0") == "0":
            print("ms", milliseconds, flush=True)
        os._exit(0)  # DDP's own end over gloo aborts now and then, when all has been measured
    cases = options.cases or (BESIDE_DDP if options.peer == "ddp" else BESIDE_ONE)
    comparisons = [beside(options.peer, case, options.pairs, options.device) for case in cases]
    report(comparisons, as_json=options.json, faster=True, peer="DDP" if options.peer == "ddp" else "one")


if __name__ == "__main__":
    main()
