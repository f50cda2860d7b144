"""How fast is it over several hosts? Beside torchrun with DDP and gloo over the same two hosts, and beside one host.

    python benchmarks/hosts.py [--pairs 3] [--json] [PART ...]

The hosts are namespaces on this machine (`tests/hosts/host_network.py`, which needs root), joined by a network of no, 1
Gbit/s or 100 Mbit/s limit. **All share this machine's cores**, so figures say nothing about scaling. Parts:

`steps`: a step of data parallelism on two hosts with two ranks each, of three sizes of model, at each rate.
`bytes`: what a host sends and receives for a step, in sizes of the model.
`start`: two hosts with two engines each, beside four engines on one host; and a second start.
`weights`: 400 MB pushed to two engines on each of two hosts, beside one ssh stream of the same bytes to each host.
`faults`: from a fault until all ranks have made a step again.
`leftovers`: until nothing is left on a host that is cut off, and on both after the kernel is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests" / "hosts"))

import step_time
import torch
from host_network import CONTROL_VARIABLE, HostNetwork
from pairs import Comparison, arguments, compare, report
from torch import nn

HERE = Path(__file__).resolve()
HOSTS = ("h1", "h2")
RANKS_EACH = 2
RATES = {"no limit": "", "1 Gbit/s": "1gbit", "100 Mbit/s": "100mbit"}
OVER_HOSTS: dict[str, step_time.Case] = {
    "0.09 M": (lambda: step_time.mlp(64, 256, 256, 20), (64,), 20, 4096, 256, 200, 1.0),
    "2.7 M": (lambda: step_time.mlp(512, 1024, 1536, 400), (512,), 400, 2048, 256, 30, 1.0),
    "10.5 M": (lambda: step_time.mlp(1024, 2048, 3072, 700), (1024,), 700, 2048, 256, 10, 1.0),
}
FEWER = {"100 Mbit/s": 5}
"""Steps on the slow network are so many times fewer."""
PORT = 29531
MIB = 1 << 20
WEIGHTS_BYTES = 400_000_000


def steps_of(case: str, rate: str) -> int:
    """How many steps to time."""
    return max(4, OVER_HOSTS[case][5] // FEWER.get(rate, 1))


def run_ranks(side: str, case: str, steps: int) -> float:
    """Milliseconds a step of two ranks on each host, all started as torchrun would."""
    ranks: list[subprocess.Popen[str]] = []
    for rank in range(len(HOSTS) * RANKS_EACH):
        variables = {
            "RANK": rank, "WORLD_SIZE": len(HOSTS) * RANKS_EACH, "LOCAL_RANK": rank % RANKS_EACH,
            "LOCAL_WORLD_SIZE": RANKS_EACH, "MASTER_ADDR": "10.77.0.11", "MASTER_PORT": PORT, "OMP_NUM_THREADS": 1,
            "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # fmt: skip
        command = ["env", "-C", str(HERE.parent), *(f"{name}={value}" for name, value in variables.items())]
        command += [sys.executable, str(HERE), "--side", side, "--steps", str(steps), f"'{case}'"]
        ssh = ["ssh", "-o", "BatchMode=yes", HOSTS[rank // RANKS_EACH]]
        ranks.append(subprocess.Popen([*ssh, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [rank.communicate() for rank in ranks]
    if lines := [line for line in outputs[0][0].splitlines() if line.startswith("ms ")]:
        return float(lines[0].split()[1])
    raise RuntimeError("\n".join(errors for _, errors in outputs))


def compare_steps(network: HostNetwork, pairs: int) -> Iterator[Comparison]:
    """Each size at each rate."""
    for name, rate in RATES.items():
        for host in HOSTS:
            network.rate(host, rate)
        for case in OVER_HOSTS:
            steps = steps_of(case, name)
            wanted = "at least 1.3" if (name, case) == ("1 Gbit/s", "10.5 M") else "at least 1"
            yield compare(
                f"step, {case}, {name}", "ms", wanted,
                lambda case=case, steps=steps: run_ranks("ours", case, steps),
                lambda case=case, steps=steps: run_ranks("peer", case, steps), pairs,
            )  # fmt: skip
    network.mend()


def compare_bytes(network: HostNetwork, pairs: int) -> Iterator[Comparison]:
    """What a host sends and receives a step, in MB, beside the parameters: the difference of a long and a short run."""
    for case in OVER_HOSTS:
        size = sum(parameter.nbytes for parameter in OVER_HOSTS[case][0]().parameters())

        def moved(steps: int, way: int, case: str = case) -> int:
            before = network.bytes("h1")[way]
            run_ranks("ours", case, steps)
            return network.bytes("h1")[way] - before

        for way, name in enumerate(("sent", "received")):
            yield compare(
                f"{name} a step, {case}", "MB", "at most 1.03",
                lambda way=way: (moved(60, way) - moved(20, way)) / 40 / 1e6, lambda size=size: size / 1e6, pairs,
            )  # fmt: skip


def timed(action: Callable[[], Any]) -> float:
    """Seconds."""
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


def start(hosts: dict[str, int], fresh: bool) -> float:
    """Seconds of a start, in this process or a fresh one, with a sum over all ranks."""
    if fresh:
        command = [sys.executable, str(HERE), "--side", "start", *(f"{host}:{count}" for host, count in hosts.items())]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    import nbdist

    cluster = nbdist.Cluster(hosts=hosts, device="cpu")
    try:
        return timed(cluster.start)
    finally:
        cluster.stop()


def compare_starts(pairs: int) -> Iterator[Comparison]:
    """Two hosts beside one; and a second start, in this process."""
    two, one = dict.fromkeys(HOSTS, RANKS_EACH), {"local": len(HOSTS) * RANKS_EACH}
    yield compare(
        "start, 2 x 2 beside 4", "s", "at most 2.5", lambda: start(two, True), lambda: start(one, True), pairs
    )
    start(one, False)
    start(two, False)
    yield compare(
        "second start, 2 x 2 beside 4", "s", "1.5 s", lambda: start(two, False), lambda: start(one, False), pairs
    )


def compare_weights(pairs: int) -> Iterator[Comparison]:
    """A push beside ssh."""
    import nbdist

    weights = torch.ones(WEIGHTS_BYTES // 4)
    data = weights.numpy().tobytes()

    def stream() -> None:
        sinks = [
            subprocess.Popen(["ssh", "-o", "BatchMode=yes", host, "cat > /dev/null"], stdin=subprocess.PIPE)
            for host in HOSTS
        ]
        for sink in sinks:
            assert sink.stdin is not None
            sink.stdin.write(data)
            sink.stdin.close()
        for sink in sinks:
            sink.wait()

    with nbdist.Cluster(hosts=dict.fromkeys(HOSTS, RANKS_EACH), device="cpu") as cluster:
        yield compare(
            "400 MB to 2 x 2", "s", "at most 1.3", lambda: timed(lambda: cluster.push(w=weights)),
            lambda: timed(stream), pairs,
        )  # fmt: skip


class TimedNet(nn.Module):
    """A model whose steps take some milliseconds; after a pause each rank notes when it has made a step again.

    Args:
        file: For that, on a folder that all hosts see: rank and time, a line each.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = step_time.mlp(64, 256, 256, 20)
        self.file = file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        now_s = time.time()  # the hosts share one clock
        if now_s - _CALLED.get("at", 0.0) > _PAUSE_S:
            _CALLED["paused"] = 1.0
        elif _CALLED.pop("paused", 0.0):  # the second call since: one step is complete
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"{os.environ['RANK']} {now_s}\n")
        _CALLED["at"] = now_s
        return self.layers(x)


_CALLED: dict[str, float] = {}
_PAUSE_S = 0.05


def measure_faults(network: HostNetwork, count: int) -> None:
    """Print the seconds from each fault until all ranks have made a step again, and how many steps are repeated."""
    import nbdist

    x, y = torch.randn(4096, 64), torch.randint(0, 20, (4096,))
    for name, (hosts, fault) in FAULTS.items():
        took, repeated = [], []
        for _ in range(count):
            with (
                tempfile.TemporaryDirectory(prefix=".shared-", dir=HERE.parents[1] / "tests" / "hosts") as folder,
                nbdist.Cluster(hosts=dict.fromkeys(hosts, RANKS_EACH), device="cpu") as cluster,
            ):
                file = Path(folder, "steps")
                net = TimedNet(str(file))
                run = cluster.train(net, (x, y), loss="cross_entropy", steps=10**9, background=True)
                while run.progress.step < FAULT_AT:
                    time.sleep(0.05)
                file.write_text("")
                began_s, at = time.time(), run.progress.step
                fault(network, cluster)
                while not (found := re.findall(r"all continue from step (\d+)", str(run.progress.notes))):
                    time.sleep(0.01)
                while len(stepped := dict(line.split() for line in file.read_text().splitlines())) < cluster.size:
                    time.sleep(0.01)
                took.append(max(float(at_s) for at_s in stepped.values()) - began_s)
                repeated.append(max(0, at - int(found[0])))
                run.stop()
                with contextlib.suppress(Exception):
                    run.wait(30)
            network.mend()
        slowest = sorted(took)[math.ceil(0.99 * count) - 1]
        print(
            f"{name:<28} the next step after {statistics.median(took):.2f} s ({min(took):.2f} to {max(took):.2f}; 99th "
            f"percentile of {count}: {slowest:.2f}), steps repeated {sum(repeated)}",
            flush=True,
        )


def two_crash(network: HostNetwork, cluster: Any) -> None:
    """Two of three hosts, one right after the other."""
    for host in ("h2", "h3"):
        network.crash(host)


FAULT_AT = 300  # steps
FAULTS: dict[str, tuple[tuple[str, ...], Callable[[HostNetwork, Any], Any]]] = {
    "engine on h2 killed": (HOSTS, lambda network, cluster: network.run("h2", f"kill -9 {cluster.engines[3].pid}")),
    "h2 crashed": (HOSTS, lambda network, cluster: network.crash("h2")),
    "h2 cut off": (HOSTS, lambda network, cluster: network.cut("h2")),
    "h2 unplugged": (HOSTS, lambda network, cluster: network.unplug("h2")),
    "h1 (rank 0) cut off": (HOSTS, lambda network, cluster: network.cut("h1")),
    "h2 and h3 of three crashed": ((*HOSTS, "h3"), two_crash),
}
KERNEL = f"""
import nbdist, sys, torch
x, y = torch.randn(256, 64), torch.randint(0, 20, (256,))
cluster = nbdist.Cluster(hosts=dict.fromkeys({HOSTS}, {RANKS_EACH}), device="cpu").start()
cluster.train(torch.nn.Linear(64, 20), (x, y), loss="cross_entropy", steps=10**9, background=True)
print("training", flush=True)
sys.stdin.read()
"""


def measure_leftovers(network: HostNetwork, count: int) -> None:
    """Print the seconds until nothing is left where a host is cut off, and on both where the kernel is killed."""
    for name, hosts in {"on h2, which is cut off": ["h2"], "anywhere, the kernel killed": [*HOSTS]}.items():
        took = []
        for _ in range(count):
            with subprocess.Popen(
                [sys.executable, "-c", KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as kernel:
                try:
                    assert kernel.stdout is not None
                    assert kernel.stdout.readline() == "training\n"
                    began_s = time.monotonic()
                    if hosts == ["h2"]:
                        network.cut("h2")
                    else:
                        kernel.kill()
                    while any(network.processes(host) for host in hosts):
                        time.sleep(0.05)
                    took.append(time.monotonic() - began_s)
                finally:
                    kernel.kill()
            network.mend()
        print(f"nothing left {name}: {statistics.median(took):.2f} s ({min(took):.2f} to {max(took):.2f})", flush=True)


PARTS = ("steps", "bytes", "start", "weights", "faults", "leftovers")


def main() -> None:
    """Measure the parts and print a table."""
    parser = arguments(__doc__, pairs=3)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Of {', '.join(PARTS)}. Default: all.")
    parser.add_argument("--side", choices=("ours", "peer", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _be(options)
    if CONTROL_VARIABLE not in os.environ:
        network = HERE.parents[1] / "tests" / "hosts" / "host_network.py"
        os.execv(sys.executable, [sys.executable, str(network), "--hosts", "3", sys.executable, *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    hosts = HostNetwork(os.environ[CONTROL_VARIABLE])
    parts = options.parts or PARTS
    comparisons: list[Comparison] = []
    for part, measured in {
        "steps": lambda: compare_steps(hosts, options.pairs),
        "bytes": lambda: compare_bytes(hosts, 1),
        "start": lambda: compare_starts(options.pairs),
        "weights": lambda: compare_weights(options.pairs),
    }.items():
        if part in parts:
            for comparison in measured():
                comparisons.append(comparison)
                print(comparison.line(faster=part == "steps"), file=sys.stderr, flush=True)
    if options.json:
        report(comparisons, as_json=True)
    if "faults" in parts:
        measure_faults(hosts, options.pairs)
    if "leftovers" in parts:
        measure_leftovers(hosts, options.pairs)


def _be(options: argparse.Namespace) -> None:
    """One process of a measurement."""
    if options.side == "start":
        hosts = {name: int(count) for name, _, count in (part.partition(":") for part in options.parts)}
        print(start(hosts, False), flush=True)
        os._exit(0)
    step_time.CASES |= OVER_HOSTS
    run = step_time.run_ours if options.side == "ours" else step_time.run_peer
    milliseconds = run(options.parts[0], "cpu", options.steps)
    if os.environ.get("RANK", "0") == "0":
        print("ms", milliseconds, flush=True)
    os._exit(0)  # see `step_time`


if __name__ == "__main__":
    main()
