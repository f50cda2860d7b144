"""The agents of other hosts, and one encrypted, authenticated connection from each.

They belong to the kernel, or to a detached cluster's anchor (see `agent_proxy`). An agent connects to its owner, never
the other way: only ssh has to reach the host. The connection is CurveZMQ, and both sides prove that they have a key
that ssh brought there. A thread owns the socket; it notices an agent that ends, and one that sends nothing for the
host timeout.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from nbdist.cluster.hosts.host import HostLostError
from nbdist.errors import ClusterError
from nbdist.keepalive import host_timeout_s
from nbdist.listening import listen_on

__all__ = ["BEATS_A_TIMEOUT", "Agents", "Invitation"]

BEATS_A_TIMEOUT = 4
"""How often an agent sends something within the host timeout."""
_LOOK_S = 0.2
_LINGER_MS = 500
_LOG_BYTES, _BACKLOG = 1 << 16, 128
_ENDED_WITHIN_S = 2.0

Invitation = dict[str, str]
"""With what an agent connects: name, address, keys and the host timeout. It is secret: it travels over ssh alone."""


class _Agent:
    """What is known of one agent.

    Args:
        name: Of its host.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.hello: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        self.pending: dict[int, concurrent.futures.Future[tuple[Any, list[bytes]]]] = {}
        self.last_beat_s = 0.0
        self.lost = ""
        self.program: subprocess.Popen[bytes] | None = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the program)
        self.on_event: Callable[[Sequence[Any]], None] = lambda event: None
        self.on_lost: Callable[[], None] = lambda: None

    @property
    def why(self) -> str:
        """Why the program that started it has ended: the last line that it wrote."""
        assert self.program is not None
        written = ""
        with contextlib.suppress(ValueError):  # closed just now, by who ends it
            written = os.pread(self.log.fileno(), _LOG_BYTES, 0).decode(errors="replace")
        lines = [line for line in written.splitlines() if line.strip()]
        return f"its agent has ended ({lines[-1] if lines else f'exit {self.program.returncode}'})"


class Agents:
    """The agents that connect to one address of this host. Safe to use from several threads; local to this process.

    Each has an identity, since the same host may have two.

    Args:
        address: Of this host, where the other hosts reach it.
    """

    def __init__(self, address: str) -> None:
        self._timeout_s = host_timeout_s()
        self._agents: dict[str, _Agent] = {}
        self._identities: dict[str, str] = {}  # of each agent, by its public key
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._unsent: collections.deque[list[bytes]] = collections.deque()
        self._ended = False
        self._context = zmq.Context()  # of its own: the keys of its peers are checked by a thread for all its sockets
        self._keys = ThreadAuthenticator(self._context)
        self._keys.start()
        self._keys.configure_curve_callback("*", credentials_provider=self)
        public, secret = zmq.curve_keypair()
        self._public = public
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_secretkey, self._socket.curve_publickey, self._socket.curve_server = secret, public, True
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a message to an agent that is gone is an error
        self._socket.setsockopt(zmq.SNDHWM, 0)  # and only that: who sends much waits for replies
        # Of a socket that listens already, on a port that may be chosen: ZeroMQ takes it over.
        with listen_on(address, _BACKLOG) as listener:
            self._socket.setsockopt(zmq.USE_FD, listener.fileno())
            port = listener.getsockname()[1]
            self._socket.bind(f"tcp://{address}:{port}")
            listener.detach()
        self._address = f"tcp://{address}:{port}"
        self._wake, self._awake = socket.socketpair()  # a closed one never is another file, as a descriptor may be
        self._thread = threading.Thread(target=self._serve, daemon=True, name="nbdist-agents")
        self._thread.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a peer with this key may connect; called by `zmq.auth`."""
        return key.decode() in self._identities

    def start(self, name: str, command: Sequence[str]) -> str:
        """Start the agent of a host; returns its identity.

        Args:
            name: Of the host.
            command: Starts the agent there; it gets the invitation on its standard input, and ends with that.
        """
        invitation = self.invite(name)
        agent = self._agents[invitation["identity"]]
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=agent.log, stderr=agent.log, start_new_session=True, bufsize=0
        )
        agent.program = program
        assert program.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `hello` says why
            program.stdin.write(json.dumps(invitation).encode() + b"\n")
        return invitation["identity"]

    def invite(self, name: str) -> Invitation:
        """A new agent of a host: its identity, and the keys with which it connects."""
        public, secret = zmq.curve_keypair()
        with self._lock:
            identity = str(next(self._numbers))
            self._agents[identity] = _Agent(name)
            self._identities[public.decode()] = identity
        return {
            "identity": identity, "name": name, "controller": self._address, "timeout_s": str(self._timeout_s),
            "server_key": self._public.decode(), "public_key": public.decode(), "secret_key": secret.decode(),
        }  # fmt: skip

    def follow(self, identity: str, on_event: Callable[[Sequence[Any]], None], on_lost: Callable[[], None]) -> None:
        """Be told of an agent, in this object's thread, which must not wait: it receives all answers.

        Args:
            identity: The agent.
            on_event: Called with what it says of itself.
            on_lost: Called once it is lost.
        """
        agent = self._agents[identity]
        agent.on_event, agent.on_lost = on_event, on_lost

    def hello(self, identity: str) -> concurrent.futures.Future[dict[str, Any]]:
        """What an agent says first: the facts of its host."""
        return self._agents[identity].hello

    def lost(self, identity: str) -> bool:
        """Whether an agent has ended, or cannot be reached."""
        return bool(self._agents[identity].lost)

    def request(
        self, identity: str, kind: str, *arguments: Any, frames: Sequence[bytes] = ()
    ) -> concurrent.futures.Future[tuple[Any, list[bytes]]]:
        """Request something of an agent that has said hello; the result is its reply, as plain data and as bytes.

        It fails with `HostLostError` if the host is lost, and with another `ClusterError` if the agent cannot do it.

        Args:
            identity: The agent.
            kind: See `agent_server`.
            arguments: Plain data.
            frames: Bytes.
        """
        future: concurrent.futures.Future[tuple[Any, list[bytes]]] = concurrent.futures.Future()
        agent, number = self._agents[identity], next(self._numbers)
        with self._lock:
            if agent.lost:
                future.set_exception(HostLostError(agent.lost))
                return future
            agent.pending[number] = future
        self._send([identity.encode(), str(number).encode(), json.dumps([kind, *arguments]).encode(), *frames])
        return future

    def hang_up(self, identity: str) -> None:
        """Tell an agent to end, and with it all that it has started; without waiting for it."""
        program = self._agents[identity].program
        assert program is not None
        assert program.stdin is not None
        with contextlib.suppress(OSError):
            program.stdin.close()

    def end(self, identity: str) -> None:
        """End an agent, and with it all that it has started. Twice is fine."""
        self.hang_up(identity)
        agent = self._agents[identity]
        assert agent.program is not None
        try:
            agent.program.wait(0.0 if agent.lost else _ENDED_WITHIN_S)
        except subprocess.TimeoutExpired:
            agent.program.kill()
            agent.program.wait()
        self._lose(agent, "its agent has ended")
        with self._lock:  # two threads may end it
            agent.log.close()

    def close(self) -> None:
        """Close all connections: the agents end. Twice is fine."""
        if self._ended:
            return
        self._ended = True
        self._awake.send(b"x")
        self._thread.join()
        for agent in self._agents.values():
            self._lose(agent, "its cluster has ended")
            agent.log.close()
        self._socket.close()
        self._keys.stop()
        self._context.destroy(linger=_LINGER_MS)
        self._wake.close()
        self._awake.close()

    def _send(self, message: list[bytes]) -> None:
        self._unsent.append(message)
        with contextlib.suppress(OSError):  # closed just now
            self._awake.send(b"x")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        interval_s = min(_LOOK_S, self._timeout_s / BEATS_A_TIMEOUT)
        looked_s = time.monotonic()
        while not self._ended:
            events = dict(poller.poll(round(1000 * interval_s)))
            if self._wake.fileno() in events:
                self._wake.recv(1 << 12)
            with contextlib.suppress(zmq.Again):
                while True:
                    self._receive(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
            while self._unsent:
                self._deliver(self._unsent.popleft())
            now_s = time.monotonic()
            if now_s - looked_s > interval_s:
                # A kernel that was stopped, or held the GIL, could not listen: all have another timeout then.
                self._look(now_s, paused=now_s - looked_s > self._timeout_s / 2)
                looked_s = now_s

    def _receive(self, frames: list[Any]) -> None:
        sender, number, data, *rest = frames
        identity = bytes(sender.buffer).decode(errors="replace")
        agent = self._agents.get(identity)
        if agent is None or self._identities.get(data.get("User-Id")) != identity:
            return  # one agent may not speak for another
        if agent.lost:
            return  # it may have been counted as lost before it has begun
        agent.last_beat_s = time.monotonic()
        number = int(bytes(number.buffer) or b"0")
        content = json.loads(bytes(data.buffer))
        if number:
            with self._lock:
                future = agent.pending.pop(number, None)
            if future is not None:
                result, error = content
                if error:
                    future.set_exception(ClusterError(f"host {agent.name}: {error}"))
                else:
                    future.set_result((result, [bytes(frame.buffer) for frame in rest]))
        elif content[0] == "hello":
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # lost just now
                agent.hello.set_result(content[1])
        elif content[0] != "beat":
            agent.on_event(content)

    def _deliver(self, message: list[bytes]) -> None:
        try:
            self._socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            self._lose(self._agents[message[0].decode()], "its connection has ended")

    def _look(self, now_s: float, *, paused: bool) -> None:
        for agent in list(self._agents.values()):
            if agent.program is None:
                continue
            ended = agent.program.poll() is not None  # of a lost one too: else it stays a zombie
            if agent.lost:
                continue
            if ended:
                self._lose(agent, agent.why)
            elif paused:
                agent.last_beat_s = now_s
            elif agent.last_beat_s and now_s - agent.last_beat_s > self._timeout_s:
                self._lose(agent, f"nothing has come from it for {self._timeout_s:g} s")

    def _lose(self, agent: _Agent, reason: str) -> None:
        with self._lock:
            if agent.lost:
                return
            agent.lost = f"host {agent.name} is lost: {reason}."
            pending = list(agent.pending.values())
            agent.pending.clear()
        error = HostLostError(agent.lost)
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has said it
            agent.hello.set_exception(error)
        for future in pending:
            future.set_exception(error)
        if not self._ended:
            agent.on_lost()
