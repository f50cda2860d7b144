"""What does it cost one kernel to follow a thousand engines? CPU time of a real kernel, with simulated engines.

    python benchmarks/scale.py [--sizes 16 64 256 1024] [--updates 10] [--json]

An engine here is a status board that another process writes as often as ranks do, two sockets that register and answer
heartbeats, or a thread that waits at the store: what the kernel reads is what ranks write, and nobody trains. Eight
share a host, whose agent is a socket of another process: it says hello, beats, and answers, encrypted as all messages
between hosts. All code of the kernel's side is nbdist's own: the run's monitor, the panel, the status, the agents'
connections, the client, the store. It runs in a notebook's
kernel; the controller and the simulated engines share the same cores, so seconds say little, and CPU time and the
exponent b of cost = a * engines^b say more.

    panel         read all boards, merge the states, draw the panel: what the monitor's thread needs for an update
    follow        the whole update: that, whether calls and processes have ended, hangs, records, messages, all threads
    status        what %dist_status displays
    states        which engines are idle, busy or lost
    living        which engines are not lost
    registration  from the first request until the client knows all engines, and the kernel's CPU time meanwhile
    stop          from the release of all ranks that wait at the store until the last one has it
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from kernel import Kernel

SIZES = [16, 64, 256, 1024]
WANTED = 0.05
UPDATES_A_S = 10
PUBLISHED_EVERY_S = 0.2
STEEP = 1.3
ROWS = {
    "panel": ("panel: an update", "CPU ms"), "follow": ("follow: an update", "CPU ms"),
    "status": ("%dist_status", "CPU ms"), "states": ("states of engines", "CPU ms"),
    "living": ("living engines", "CPU ms"), "registration_s": ("registration", "s"),
    "registration_cpu_s": ("registration, kernel", "CPU s"), "registration_controller_cpu_s":
    ("registration, controller", "CPU s"), "stop_s": ("stop: all released", "s"),
}  # fmt: skip
FIRST_STEPS = 2000
STEPS_AN_UPDATE = 3
REPEATED = 5
ENGINES_A_HOST = 8
WITHIN_S = 60.0
SETTLE_S = 0.5
STACK_BYTES = 256 << 10
SOCKETS_AN_ENGINE = 2


# In the kernel.


class Enough(BaseException):
    """Ends the monitor's loop from within its drawing; no Exception, which would only end the panel."""


def measure(size: int, updates: int) -> None:
    """Measure everything with so many engines, and print it as JSON; called in the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    figures: dict[str, Any] = {}
    for part in (lambda: _follow(size, updates), lambda: _register(size), lambda: _stop(size)):
        try:
            figures |= part()
        except Exception as error:  # the other figures are worth having
            figures.setdefault("stopped_by", []).append(f"{type(error).__name__}: {error}")
    print("figures", json.dumps(figures))


def _cpu_ms(call: Callable[[], object]) -> float:
    """CPU-milliseconds of a call, the least of a few: what varies comes from other processes."""
    spent = []
    for _ in range(REPEATED):
        began_s = time.thread_time()
        call()
        spent.append(time.thread_time() - began_s)
    return 1000 * min(spent)


def _follow(size: int, updates: int) -> dict[str, float]:
    """Let the real monitor follow a run of engines that only write their boards."""
    from nbdist.cluster.calls.pending_call import LostCall, PendingCall
    from nbdist.cluster.cluster import Cluster
    from nbdist.cluster.engines.engines import Engines
    from nbdist.cluster.hosts.agents import Agents
    from nbdist.cluster.hosts.remote_host import RemoteHost
    from nbdist.cluster.launch.launcher import Launch
    from nbdist.cluster.runs import monitor as monitoring
    from nbdist.cluster.runs.dispatch import RunDispatch
    from nbdist.cluster.runs.run import Run
    from nbdist.cluster.runs.run_control import RunControl
    from nbdist.cluster.runs.run_spec import RunSpec
    from nbdist.core.comm.authenticated_store import host_store
    from nbdist.notebook import status
    from nbdist.notebook.dashboard import PanelDashboard
    from nbdist.plan import Plan
    from nbdist.telemetry import RankState, RunState

    class Invited(Agents):
        """Nobody has started them here: their process is ended by who holds it."""

        def hang_up(self, identity: str) -> None:
            pass

        def end(self, identity: str) -> None:
            pass

    class Simulated(Launch):
        """A launch without engines: no controller, and all agents in one process."""

        def __init__(self) -> None:
            self.allocation = None
            self._prepare(Path(tempfile.mkdtemp(prefix="nbdist-")), None, "")
            names = [f"h{number}" for number in range(math.ceil(size / ENGINES_A_HOST))]
            self._agents = Invited("127.0.0.1")
            invitations = {name: self._agents.invite(name) for name in names}
            for name, invitation in invitations.items():
                self.hosts[name] = RemoteHost(name, invitation["identity"], self._agents)
            self._held = contextlib.ExitStack()
            self._held.enter_context(_holder("serve", json.dumps([*invitations.values()]), len(names)))
            assert all(host.facts for host in self.hosts.values())
            self._cluster = SimpleNamespace(controller=None, stop_cluster_sync=lambda: None)
            self.client = SimpleNamespace(ids=list(range(size)), close=lambda: None)

        def end(self) -> None:
            super().end()
            self._held.close()
            self._agents.close()

    class Running(LostCall):
        """A call of `train` that has not returned."""

        def __init__(self) -> None:
            PendingCall.__init__(self)

    launch = Simulated()
    try:
        engines = Engines(launch, host_store(), size, "cpu", WITHIN_S, 0)
        engines._table.place_first({
            rank: {
                "host": f"h{rank // ENGINES_A_HOST}", "host_id": f"h{rank // ENGINES_A_HOST}", "cores": ENGINES_A_HOST,
                "pid": rank, "mark": f"{rank}:1",
            }
            for rank in range(size)
        })  # fmt: skip
        plan = Plan.create(ranks=size, cores=size, steps=10**6, batch_size=size)
        ranks = {rank: RankState(rank=rank) for rank in range(size)}
        progress = RunState(title="Net (1 M parameters)", plan=plan.to_dict(), ranks=ranks)
        spec = RunSpec(run_id=f"scale-{size}", task=None, plan=plan, title=progress.title)
        run = Run(RunControl(spec, progress, lambda *command: None))
        dispatch = RunDispatch(run.control, engines, None, None, 0, packed=(None, None))  # type: ignore[arg-type]
        publisher = dispatch._make_boards().publisher
        written = json.dumps([str(publisher.records), publisher.host_id, publisher.boards, plan.to_dict()])
        panel = PanelDashboard()
        spent = {"drawn": 0, "panel": 0.0, "began": 0.0}

        def timed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> None:
                began_s = time.thread_time()
                try:
                    method(*arguments)
                finally:
                    if spent["drawn"] > (method == drawing and 1):  # the first drawing makes the panel
                        spent["panel"] += time.thread_time() - began_s

            return call

        def watch(run: Run) -> None:
            panel.update(run)
            spent["drawn"] += 1
            if spent["drawn"] == 1:
                spent["began"] = time.process_time()
            elif spent["drawn"] > updates:
                raise Enough

        monitor = monitoring.RunMonitor(
            run, dispatch, [Running() for _ in range(size)], where=lambda: None, watch=watch,  # type: ignore
            on_end=lambda: None, context=contextvars.copy_context(),
        )  # fmt: skip
        drawing = monitor._draw
        monitor._merge, monitor._draw = timed(monitor._merge), timed(drawing)  # type: ignore[method-assign]
        usual_s, monitoring._INTERVAL_S = monitoring._INTERVAL_S, 1 / UPDATES_A_S
        try:
            with _holder("write", written, size):
                monitor._collect()
        except Enough:
            follow_s = time.process_time() - spent["began"]
        finally:
            monitoring._INTERVAL_S = usual_s
        assert progress.ranks[0].step > FIRST_STEPS, "no update has read what ranks have published"
        cluster = Cluster(engines=1, device="cpu")
        cluster._up, cluster._run_queue = engines, SimpleNamespace(computing=True, current=run, queued=[])  # type: ignore
        given = status.current_cluster, status.last_run
        status.current_cluster, status.last_run = lambda: cluster, lambda: run
        try:
            status_ms = _cpu_ms(status._bundle)
        finally:
            status.current_cluster, status.last_run = given
            cluster._up = None
        return {
            "panel": 1000 * spent["panel"] / updates, "follow": 1000 * follow_s / updates, "status": status_ms,
            "states": _cpu_ms(lambda: engines._table.states(busy=True)), "living": _cpu_ms(engines._table.living),
        }  # fmt: skip
    finally:
        launch.end()


def _writer(publisher: Any, size: int, plan: dict[str, Any]) -> Callable[[], None]:
    """Makes a function that lets every rank publish its next state, as ranks do: folded, as JSON, on its board."""
    from nbdist.telemetry import Curves, Progress, RunStarted, Shares

    sinks = [publisher.sink(rank) for rank in range(size)]
    curves, steps = Curves(), [0]
    for rank, sink in enumerate(sinks):
        sink.emit(RunStarted(
            rank=rank, run_id="scale", title="Net", plan=plan, steps_total=10**6, host="host", pid=1000 + rank,
            device="cpu", place={"dp": rank},
        ))  # fmt: skip

    def write() -> None:
        until = steps[0] + STEPS_AN_UPDATE if steps[0] else FIRST_STEPS
        for step in range(steps[0] + 1, until + 1):
            curves.add("loss", step, 0.3 + 2 * math.exp(-step / 600))
        steps[0] = until
        for rank, sink in enumerate(sinks):
            sink._next_s = 0.0  # as if the time since the last one were over
            busy = 0.5 + 0.4 * (rank * 7919 % 101) / 101  # each differs, in no order
            sink.emit(Progress(
                rank=rank, step=until, epoch=1, samples=8 * until, loss=2.3 / (1 + rank % 7), lr=1e-3,
                samples_per_s=400.0 + rank % 13, memory_mib=310.0 + rank % 5, step_s=0.02,
                shares=Shares(busy - 0.1, 0.08, 0.02, 1 - busy), curves=curves.take() if rank == 0 else {},
            ))  # fmt: skip

    return write


def _register(size: int) -> dict[str, float]:
    """Start a controller as nbdist does, and let engines of another process register."""
    import psutil

    from nbdist.cluster.hosts.host_choice import LOCAL, HostChoice
    from nbdist.cluster.launch.launcher import Launch

    launch = Launch(HostChoice(engines={LOCAL: 1}))  # a controller and a client, and one real engine
    try:
        launch.wait_for(1, WITHIN_S, lambda words: None)
        controller = psutil.Process(launch._cluster.controller.process.pid)
        with _holder("register", launch._environment["IPP_CONNECTION_INFO"], size) as (orders_to, _):
            times = controller.cpu_times()
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            orders_to.write("go\n")
            orders_to.flush()
            launch.wait_for(size + 1, WITHIN_S, lambda words: None)
            took_s, cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
            now = controller.cpu_times()
            time.sleep(SETTLE_S)
            assert len(launch.client.ids) == size + 1, f"of {size} engines {len(launch.client.ids) - 1} are left"
            return {
                "registration_s": took_s, "registration_cpu_s": cpu_s,
                "registration_controller_cpu_s": now.user + now.system - times.user - times.system,
            }  # fmt: skip
    finally:
        launch.end()


def _stop(size: int) -> dict[str, float]:
    """Release ranks that wait at the store."""
    from nbdist.core.comm.authenticated_store import host_store
    from nbdist.core.comm.rendezvous import GenerationStore

    store = host_store()
    with _holder("wait", json.dumps(store.address), size) as (_, replies):
        time.sleep(SETTLE_S)
        began_s = time.monotonic()
        GenerationStore(store, 1).release()
        return {"stop_s": float(replies.readline()) - began_s}


@contextlib.contextmanager
def _holder(kind: str, address: str, size: int) -> Iterator[tuple[IO[str], IO[str]]]:
    """The process that holds the simulated engines, once they are connected; it ends with the context."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--hold", kind, address, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the process of the simulated engines has ended: {process.wait()}")
        yield process.stdin, process.stdout
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# In the process of the simulated engines.


def hold(kind: str, address: str, size: int) -> None:
    """Be so many engines until this process is killed, or the kernel is gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    held = {"serve": _hold_agents, "write": _hold_boards, "register": _hold_registered, "wait": _hold_waiting}
    held[kind](json.loads(address), size)


def _hold_boards(given: list[Any], size: int) -> None:
    """What ranks publish, as often as they do."""
    from nbdist.engine.state_publisher import StatePublisher

    records, host_id, boards, plan = given
    write = _writer(StatePublisher(Path(records), host_id, tuple(boards)), size, plan)
    write()
    print("ready", flush=True)
    while True:
        began_s = time.monotonic()
        write()
        time.sleep(max(0.0, began_s + PUBLISHED_EVERY_S - time.monotonic()))


def _hold_agents(invitations: list[dict[str, str]], size: int) -> None:
    """What `agent_server` does for the kernel, for hosts whose memory is this process's."""
    import zmq

    from nbdist.cluster.hosts.agents import BEATS_A_TIMEOUT
    from nbdist.cluster.hosts.host import HostFacts
    from nbdist.cluster.hosts.local_host import LocalHost, versions
    from nbdist.process_mark import process_mark

    context: Any = zmq.Context()
    context.set(zmq.MAX_SOCKETS, size + 16)
    beat_s = float(invitations[0]["timeout_s"]) / BEATS_A_TIMEOUT
    poller, sockets = zmq.Poller(), []
    with tempfile.TemporaryDirectory(prefix="nbdist-") as folder:
        for invitation in invitations:
            made = context.socket(zmq.DEALER)
            made.setsockopt(zmq.IDENTITY, invitation["identity"].encode())
            made.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * beat_s))
            made.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * float(invitation["timeout_s"])))
            made.curve_serverkey = invitation["server_key"].encode()
            made.curve_publickey = invitation["public_key"].encode()
            made.curve_secretkey = invitation["secret_key"].encode()
            made.connect(invitation["controller"])
            name = invitation["name"]
            facts = HostFacts(name=name, host_id=name, cores=ENGINES_A_HOST, versions=versions())
            made.send_multipart([b"", json.dumps(["hello", dataclasses.asdict(facts)]).encode()])
            poller.register(made, zmq.POLLIN)
            sockets.append(made)
        host = LocalHost(facts, Path(folder), process_mark(os.getpid()))
        print("ready", flush=True)
        next_s = [time.monotonic() + beat_s * i / size for i in range(size)]
        while True:
            for each, _ in poller.poll(10):
                number, data, *_ = each.recv_multipart()
                kind, *arguments = json.loads(data)
                answer, sent = None, []
                if kind in ("read_memory", "read_records"):
                    sent = (host.begin_read if kind == "read_memory" else host.read_records)(*arguments).result()
                elif kind in ("hold", "release", "memory"):
                    answer = getattr(host, kind)(*arguments)
                each.send_multipart([number, json.dumps([answer, ""]).encode(), *sent])
            now_s = time.monotonic()
            for i in range(size):
                if now_s > next_s[i]:
                    next_s[i] = now_s + beat_s
                    sockets[i].send_multipart([b"", b'["beat"]'])


def _hold_registered(info: dict[str, Any], size: int) -> None:
    """What ipyparallel's engine does first, see its app.py: a request, and then each ping comes back as a pong."""
    import zmq
    from jupyter_client.session import Session

    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, SOCKETS_AN_ENGINE * size + 16)
    session = Session(key=info["key"].encode())

    def url(name: str) -> str:
        return f"{info['interface']}:{info[name]}".replace("//*", "//127.0.0.1").replace("//0.0.0.0", "//127.0.0.1")

    pings = context.socket(zmq.SUB)
    pings.setsockopt(zmq.SUBSCRIBE, b"")
    pings.connect(url("hb_ping"))
    names = [str(uuid.uuid4()) for _ in range(size)]
    requests, pongs = [], []
    for name in names:
        for sockets, key in ((requests, "registration"), (pongs, "hb_pong")):
            sockets.append(made := context.socket(zmq.DEALER))
            made.setsockopt(zmq.IDENTITY, name.encode())
            made.connect(url(key))
    print("ready", flush=True)
    sys.stdin.readline()
    for name, request in zip(names, requests, strict=True):
        session.send(request, "registration_request", content={"uuid": name})
    beating: list[Any] = []
    poller = zmq.Poller()
    poller.register(pings, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while sys.stdin.fileno() not in (ready := dict(poller.poll(5))):
        if len(beating) < size:  # an engine's heart beats once its request is accepted
            for index, request in enumerate(requests):
                if request is not None and request.poll(0):
                    request.recv_multipart()
                    requests[index] = None
                    beating.append((request, pongs[index]))
        if pings in ready:
            ping = pings.recv_multipart()
            for _, pong in beating:
                pong.send_multipart(ping)


def _hold_waiting(address: list[str], size: int) -> None:
    """Threads that wait for a key as ranks do."""
    from nbdist.core.comm.rendezvous import GenerationStore, connect_store
    from nbdist.errors import PeerLostError

    threading.stack_size(STACK_BYTES)
    stores = [GenerationStore(connect_store(address[0], address[1]), 1) for _ in range(size)]
    released_s: list[float] = []

    def wait(store: GenerationStore) -> None:
        try:
            store.wait(["never"])
        except PeerLostError:
            released_s.append(time.monotonic())

    waiting = [threading.Thread(target=wait, args=(store,), daemon=True) for store in stores]
    for thread in waiting:
        thread.start()
    print("ready", flush=True)
    for thread in waiting:
        thread.join()
    print(max(released_s) if len(released_s) == size else math.nan, flush=True)
    sys.stdin.read()


# In the benchmark's own process.


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The b of cost = a * size^b, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(c) for c in costs]).slope


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="How many engines.")
    parser.add_argument("--updates", type=int, default=10, metavar="N", help="Updates of the panel. Default: 10.")
    parser.add_argument("--json", action="store_true", help="Print JSON in place of a table.")
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        hold(options.hold[0], options.hold[1], int(options.hold[2]))
        return
    figures: dict[int, dict[str, Any]] = {}
    for size in options.sizes:
        with Kernel() as kernel:
            kernel.run(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport scale")
            printed = kernel.run(f"scale.measure({size}, {options.updates})")
            figures[size] = json.loads(printed.rpartition("figures ")[2])
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{'engines':<26}" + "".join(f"{size:>10,}" for size in options.sizes) + "         b")
    for key, (name, unit) in ROWS.items():
        there = [(size, figures[size][key]) for size in options.sizes if key in figures[size]]
        cells = [f"{figures[size][key]:10.3f}" if key in figures[size] else f"{'–':>10}" for size in options.sizes]
        line = f"{name + ', ' + unit:<26}"[:26] + "".join(cells)
        if len(there) > 1:
            b = exponent([size for size, _ in there], [cost for _, cost in there])
            line += f"{b:10.2f}" + (f"   GROWS FASTER THAN THE NUMBER OF ENGINES (b > {STEEP})" if b > STEEP else "")
        print(line)
    for key in ("panel", "follow"):
        shares = [f"{figures[n][key] * UPDATES_A_S / 1000:.1%}" for n in options.sizes if key in figures[n]]
        print(f"{key}: {UPDATES_A_S} updates a second are {', '.join(shares)} of a core; wanted: at most {WANTED:.0%}")
    for size in options.sizes:
        for why in figures[size].get("stopped_by", []):
            print(f"{size:,} engines stopped by {why}")


if __name__ == "__main__":
    main()
