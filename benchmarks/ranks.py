"""Measuring on the ranks themselves: the script that is measured starts anew under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["figures_of_ranks", "on_a_rank", "tell"]


def on_a_rank() -> bool:
    """Whether this process is one of the ranks that `figures_of_ranks` has started."""
    return "RANK" in os.environ


def tell(figures: Any) -> None:
    """Say what this rank has measured; rank 0's is heard."""
    if os.environ["RANK"] == "0":
        print("figures", json.dumps(figures), flush=True)


def figures_of_ranks(script: str, ranks: int, *words: str) -> Any:
    """What rank 0 tells, of `ranks` with one thread each that run `script` with `words`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True, env=environment)
    line = next(line for line in done.stdout.splitlines() if line.startswith("figures"))
    return json.loads(line.split(" ", 1)[1])
