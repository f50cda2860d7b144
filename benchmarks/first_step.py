"""How long from Enter to the first optimizer step? Beside accelerate's `notebook_launcher`, two processes on the CPU.

    python benchmarks/first_step.py [--pairs 5] [--json]

The same tiny model, data and loss in a real kernel. Ours is the whole cell `%dist_train ... --steps 1` on a warm
cluster, until the trained weights are back in the notebook; the peer's ends at the end of the first step of the slower
process, without the weights. So the ratio flatters the peer.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from kernel import Kernel
from pairs import Comparison, arguments, report

TASK = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
x, y = torch.randn(512, 64), torch.randint(0, 10, (512,))
"""

PEER = """
def first_step(folder):
    import time
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    replica, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    inputs, targets = next(iter(loader))
    accelerator.backward(nn.functional.cross_entropy(replica(inputs), targets))
    optimizer.step()
    open(f"{folder}/{accelerator.process_index}", "w").write(str(time.time()))
"""

LAUNCH = """
from accelerate import notebook_launcher
began = time.time()
notebook_launcher(first_step, (%r,), num_processes=2, use_port=%r)
print("began", began)
"""


def peer() -> float:
    """Seconds of accelerate, in a kernel of its own with everything imported that can be."""
    with Kernel() as kernel, tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        kernel.run(TASK + PEER)
        began = float(kernel.run(LAUNCH % (folder, port)).split("began ")[-1])
        return max(float(file.read_text()) for file in Path(folder).iterdir()) - began


def measure(pairs: int) -> list[Comparison]:
    """The first and the second training after a start, each beside the same starts of the peer."""
    first, later, theirs = [], [], []
    train = "%dist_train model (x, y) --loss cross_entropy --batch-size 32 --steps 1"
    for _ in range(pairs):
        with Kernel() as kernel:
            kernel.run("%dist_start -n 2 --device cpu\n" + TASK)
            first.append(kernel.seconds(train))
            later.append(kernel.seconds(train))
        theirs.append(peer())
    return [
        Comparison(name="first %dist_train", unit="s", ours=first, peer=theirs, target="at most 0.1"),
        Comparison(name="second %dist_train", unit="s", ours=later, peer=theirs, target="at most 0.05"),
    ]


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__, pairs=5).parse_args()
    report(measure(options.pairs), as_json=options.json, peer="accelerate")


if __name__ == "__main__":
    main()
