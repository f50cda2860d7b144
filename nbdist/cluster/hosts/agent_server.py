"""Agent: the program that nbdist runs on another host. It forks engines there, signals and watches them, and ends them.

Whoever starts it writes one line to its standard input, an invitation (see `agents`), and keeps that open. It ends, and
all that it has started, when its input does, when the kernel's connection does, or when nothing comes from there for
the host timeout: of two sides of a partition only the kernel's goes on. Between two clusters of one
kernel it waits.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import zmq
from zmq.utils.monitor import recv_monitor_message

from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.agents import BEATS_A_TIMEOUT, Invitation
from nbdist.cluster.hosts.host import HostFacts
from nbdist.cluster.hosts.local_host import LocalHost, interface_to, versions
from nbdist.keepalive import HOST_TIMEOUT_VARIABLE
from nbdist.plan.capacity import available_cores, may_have_gpus
from nbdist.process_mark import process_mark
from nbdist.telemetry.host import host_id

__all__ = ["main"]

_LOOK_S = 0.1
_THREADS = 4
_GRACE_S = 20.0
"""How long after SIGTERM the kernel may still use this host; Slurm kills after 30 s."""
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


class _Agent:
    """Serves the kernel.

    Args:
        invitation: See `Agents.invite`.
        folder: For the folders of clusters on this host.
    """

    def __init__(self, invitation: Invitation, folder: Path) -> None:
        self._folders = (folder / str(number) for number in itertools.count(1))
        self._beat_s = float(invitation["timeout_s"]) / BEATS_A_TIMEOUT
        interface, address = interface_to(invitation["controller"].rpartition("/")[2].rpartition(":")[0])
        os.environ[HOST_TIMEOUT_VARIABLE] = invitation["timeout_s"]
        self._facts = HostFacts(
            name=invitation["name"], host_id=host_id(), cores=available_cores(), gpus=_count_gpus(), address=address,
            interface=interface, python=sys.executable, versions=versions(),
        )  # fmt: skip
        self.host = self._new_host()
        self._replies: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._wake, self._awake = os.pipe()
        self._ends_s = math.inf  # when it does so by itself
        self._requests = concurrent.futures.ThreadPoolExecutor(_THREADS)
        context: Any = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, invitation["identity"].encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * self._beat_s))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * self._beat_s * BEATS_A_TIMEOUT))
        self._socket.curve_serverkey = invitation["server_key"].encode()
        self._socket.curve_publickey = invitation["public_key"].encode()
        self._socket.curve_secretkey = invitation["secret_key"].encode()
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(invitation["controller"])

    def terminate(self) -> None:
        """Tell the kernel that this host is to be left, and end after a while; at once if that is called again."""
        if self._ends_s < math.inf:
            sys.exit("terminated")
        self._ends_s = time.monotonic() + _GRACE_S
        os.write(self._awake, b"x")

    def serve(self) -> None:
        """Serve until the kernel, the connection to it or the one to whoever started this has ended."""
        self._tell("hello", dataclasses.asdict(self._facts))
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake, 0):
            poller.register(source, zmq.POLLIN)
        beat_s, known, terminated = 0.0, set[str](), False
        while time.monotonic() < self._ends_s:
            ready = dict(poller.poll(round(1000 * _LOOK_S)))
            if 0 in ready and not os.read(0, 1 << 12):
                return
            if self._monitor in ready and recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED:
                return
            if self._wake in ready:
                os.read(self._wake, 1 << 12)
            if self._socket in ready:
                number, data, *frames = self._socket.recv_multipart()
                self._requests.submit(self._answer, number, json.loads(data), frames)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._socket.send_multipart(self._replies.get_nowait())
            if self._ends_s < math.inf and not terminated:
                terminated = True
                self._tell("terminated")
            running = self.host.processes()
            for mark in known - running:
                self._tell("ended", mark)
            known = running
            if time.monotonic() - beat_s > self._beat_s:
                self._tell("beat")
                beat_s = time.monotonic()

    def _new_host(self) -> LocalHost:
        return LocalHost(self._facts, next(self._folders), process_mark(os.getpid()))

    def _tell(self, *event: Any) -> None:
        """Send what the kernel has not requested."""
        self._socket.send_multipart([b"", json.dumps(event).encode()])

    def _answer(self, number: bytes, request: list[Any], frames: list[bytes]) -> None:
        """Answer a request, in a thread: starting engines may wait until torch is loaded."""
        kind, *arguments = request
        sent: list[bytes] = []
        try:
            reply: Callable[..., Any] = getattr(self, f"_do_{kind}")
            answer = [reply(*arguments, *frames), ""]
            if isinstance(answer[0], list) and answer[0] and isinstance(answer[0][0], bytes):
                sent, answer = answer[0], [None, ""]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        self._replies.put([number, json.dumps(answer).encode(), *sent])
        os.write(self._awake, b"x")

    def _do_start_engines(self, count: int, environment: dict[str, str], folder: str) -> list[str]:
        with contextlib.suppress(OSError):  # the notebook's folder need not be here
            os.chdir(folder)
        return self.host.start_engines(count, environment).result()

    def _do_processes(self) -> list[str]:
        return sorted(self.host.processes())

    def _do_send_signal(self, mark: str, number: int) -> None:
        self.host.send_signal(mark, number)

    def _do_stack(self, mark: str, path: str) -> tuple[Any, bool]:
        frames, stopped = self.host.stack(mark, path)
        plain = None if frames is None else [(f.filename, f.lineno, f.name, f.line) for f in frames]
        return plain, stopped

    def _do_memory(self, mark: str) -> int:
        return self.host.memory(mark)

    def _do_read_records(self, run_id: str, starts: list[tuple[int, int]]) -> list[bytes]:
        return self.host.read_records(run_id, starts).result()

    def _do_hold(self, count: int) -> list[str]:
        return self.host.hold(count)

    def _do_read_memory(self, places: list[tuple[str, int, int]]) -> list[bytes]:
        return self.host.begin_read(places).result()

    def _do_write_memory(self, path: str, start: int, content: bytes) -> None:
        self.host.write_memory(path, start, content)

    def _do_empty(self, paths: list[str]) -> None:
        self.host.empty(paths)

    def _do_release(self, paths: list[str]) -> None:
        self.host.release(paths)

    def _do_open_socket(self) -> str:
        return self.host.open_socket()

    def _do_receive(self, path: str, within_s: float) -> list[bytes]:
        received = self.host.receive(path, within_s)
        return [] if received is None else [received]

    def _do_send(self, path: str, data: bytes) -> None:
        self.host.send(path, data)

    def _do_close_socket(self, path: str) -> None:
        self.host.close_socket(path)

    def _do_log_tail(self) -> str:
        return self.host.log_tail()

    def _do_end_cluster(self) -> None:
        ended, self.host = self.host, self._new_host()
        ended.end()


def _count_gpus() -> int:
    """The number of GPUs that torch sees, in a process of its own: this one must stay small."""
    if not may_have_gpus():
        return 0
    counted = subprocess.run([sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False)
    return int(counted.stdout.strip() or 0)


def _end(folder: Path, host: LocalHost | None) -> NoReturn:
    """End all that was started here, and this process."""
    try:
        if host is not None:
            host.end()
        fork_client.end_server()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def main() -> None:
    """Entry point."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            sys.exit("the kernel has ended before this agent has begun")
        line += part
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal that ssh was started in
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # input ends as well
    # Slurm terminates every process before it kills them: only this one acts upon it. Those that it starts ignore it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    invitation = json.loads(line)
    folder = Path(tempfile.mkdtemp(prefix="nbdist-"))
    log = os.open(folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    errors = os.dup(2)
    os.dup(1)  # until the end: Open MPI closes the input of a process that has closed its output
    os.dup2(log, 1)
    os.dup2(log, 2)  # what is started here must not keep ssh's connection open
    agent: _Agent | None = None
    try:
        if fork_client.can_fork():
            fork_client.require_server(str(folder))  # it loads torch from now on
        threading.current_thread().name = "nbdist-agent"
        agent = _Agent(invitation, folder)
        signal.signal(signal.SIGTERM, lambda *_: agent.terminate())
        os.close(errors)
        agent.serve()
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(errors, f"{type(error).__name__}: {error}\n".encode())
        raise
    finally:
        _end(folder, None if agent is None else agent.host)


if __name__ == "__main__":
    main()
