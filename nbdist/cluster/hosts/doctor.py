"""Doctor: whether engines could run on other hosts: one line for each thing that was tried, and what to do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.local_host import interface_to, versions
from nbdist.cluster.hosts.probe import Listener
from nbdist.errors import ClusterError, PlanError

__all__ = ["Finding", "examine_hosts"]

_PROGRAM = """
try:
    from nbdist.cluster.hosts.probe import main
except ImportError as error:
    import sys
    sys.exit(f"{error} in {sys.executable}")
main()
"""
_ANSWERS_WITHIN_S = 20.0
_COUNT = 1 << 24  # bytes, each way
_SLOW_MB_S = 12.0  # about 100 Mbit/s
_CLOCKS_S = 1.0
_CURES = (
    (r"permission denied", "put your key there (ssh-copy-id {host}), or load it (ssh-add)"),
    (r"host key verification failed", "log in once by hand (ssh {host}) and compare its key"),
    (r"identification has changed", "if the host is new, forget the old one: ssh-keygen -R {host}"),
    (r"could not resolve", "write it into ~/.ssh/config (HostName) or /etc/hosts"),
    (r"refused", "start an ssh server there, or name its port in ~/.ssh/config"),
    (r"timed out|no route|unreachable", "is it on, and does a firewall let ssh (port 22) through?"),
    (r"nbdist|no module", "install there what is here: pip install nbdist"),
    (r"not found|no such file", "install Python there, or name it with c.SSHEngineLauncher.remote_python"),
)
"""What to do, by what ssh and Python write."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found out about a host.

    Args:
        host: Its name; of two hosts, both.
        tried: What was tried, in a word or two.
        result: What came back, and what to do if it is not as it should be.
        kind: "ok", "note" if engines can run nevertheless, or "FAILED".
    """

    host: str
    tried: str
    result: str
    kind: str = "ok"

    def __str__(self) -> str:
        return f"{self.host:<12} {self.tried:<14} {self.kind:<7} {self.result}"


class _Asked:
    """The probe of a host.

    Raises:
        ClusterError: It does not begin; says why.
    """

    def __init__(self, launcher: AgentLauncher, host: str) -> None:
        self.host = host
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the program)
        self._program = subprocess.Popen(
            launcher.program_command(host, _PROGRAM), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._collecting = threading.Thread(target=self._collect, daemon=True, name="nbdist-doctor")
        self._collecting.start()

    def ask(self, kind: str, *arguments: Any) -> Any:
        """The answer to a request.

        Raises:
            ClusterError: There is none; says why.
        """
        assert self._program.stdin is not None
        with contextlib.suppress(OSError):
            self._program.stdin.write(json.dumps([kind, *arguments]) + "\n")
            self._program.stdin.flush()
        try:
            line = self._answers.get(timeout=_ANSWERS_WITHIN_S)
        except queue.Empty:
            raise ClusterError(f"no answer within {_ANSWERS_WITHIN_S:g} s") from None
        if not line:
            raise ClusterError(self._why)
        answer, error = json.loads(line)
        if error:
            raise ClusterError(error)
        return answer

    @functools.cached_property
    def listener(self) -> tuple[int, str]:
        """The port and the token of its own listener."""
        port, token = self.ask("listener")
        return port, token

    def close(self) -> None:
        """End the probe."""
        assert self._program.stdin is not None
        with contextlib.suppress(OSError):
            self._program.stdin.close()
        try:
            self._program.wait(2.0)
        except subprocess.TimeoutExpired:
            self._program.kill()
            self._program.wait()
        self._collecting.join()
        assert self._program.stdout is not None
        self._program.stdout.close()
        self._log.close()

    def _collect(self) -> None:
        assert self._program.stdout is not None
        for line in self._program.stdout:
            if line.startswith("["):  # else what a login shell prints
                self._answers.put(line)
        self._answers.put("")

    @property
    def _why(self) -> str:
        written = os.pread(self._log.fileno(), 1 << 16, 0).decode(errors="replace")
        lines = [line for line in written.splitlines() if line.strip()]
        return lines[-1].strip().rstrip(".") if lines else "the connection was closed"


def examine_hosts(
    launcher: AgentLauncher, hosts: Sequence[str], interface: str | None = None, folder: str = ""
) -> Iterator[Finding]:
    """Try what engines on other hosts need. Nothing is left there.

    Args:
        launcher: How hosts are reached.
        hosts: Their names.
        interface: See `AgentLauncher.address_towards`.
        folder: Which all hosts should see, as for checkpoints; by default the present one.

    Yields:
        A finding for each thing that was tried, as soon as it is known.
    """
    with contextlib.ExitStack() as cleanup:
        listener = Listener()
        cleanup.callback(listener.close)
        reached: dict[str, tuple[_Asked, str, str]] = {}
        for host in hosts:
            try:
                own = launcher.address_towards([host], interface)
            except PlanError as error:
                yield Finding(host=host, tried="address", result=str(error), kind="FAILED")
                continue
            yield Finding(host=host, tried="address", result=f"reached from {own} ({interface_to(own)[0] or 'lo'})")
            asked = _Asked(launcher, host)
            cleanup.callback(asked.close)
            began_s = time.monotonic()
            try:
                facts = asked.ask("facts")
            except ClusterError as error:
                yield Finding(host=host, tried="log in", result=_with_cure(str(error), host), kind="FAILED")
                continue
            yield Finding(host=host, tried="log in", result=f"{time.monotonic() - began_s:.1f} s")
            yield _of_versions(host, facts)
            reached[host] = asked, own, launcher.real_name(host)
        for host, (asked, own, _) in reached.items():
            cure = f"let the firewall of this host pass connections from {host}, or choose another --interface"
            if not launcher.tunnels:
                yield _of_connection(asked, "to this host", (own, listener.port, listener.token), cure)
            yield _of_clock(host, asked)
            yield _of_folder(host, asked, folder or os.getcwd())
        for host, (asked, _, _) in reached.items():
            for other, (peer, _, address) in reached.items():
                if host != other and not launcher.tunnels:
                    cure = f"let the firewall of {other} pass connections from {host}: their ranks exchange sums"
                    yield _of_connection(asked, f"to {other}", (address, *peer.listener), cure)


def _of_versions(host: str, facts: dict[str, Any]) -> Finding:
    own, there = versions(), facts["versions"]
    other = [name for name in own if there.get(name) != own[name]]
    if not other:
        listed = ", ".join(f"{name} {version}" for name, version in own.items())
        return Finding(host=host, tried="versions", result=f"{listed}, as here")
    differing = ", ".join(f"{name} {there.get(name, 'is missing')}" for name in other)
    here = ", ".join(f"{name} {own[name]}" for name in other)
    cure = f"{differing} in {facts['python']}, and here {here}: install the same there"
    return Finding(host=host, tried="versions", result=cure, kind="FAILED")


def _of_connection(asked: _Asked, tried: str, listener: tuple[str, int, str], cure: str) -> Finding:
    host = asked.host
    try:
        there_s, back_s = asked.ask("connect", *listener, _COUNT)
    except ClusterError as error:
        return Finding(host=host, tried=tried, result=f"{error}: {cure}", kind="FAILED")
    speeds = [_COUNT / 1e6 / max(seconds, 1e-9) for seconds in (there_s, back_s)]
    text = f"{speeds[0]:,.0f} MB/s there, {speeds[1]:,.0f} MB/s back"
    if min(speeds) < _SLOW_MB_S:
        slow = "slow: prefer dp over these hosts, large batches (--accumulate), and models whose sums are small"
        return Finding(host=host, tried=tried, result=f"{text}, {slow}", kind="note")
    return Finding(host=host, tried=tried, result=text)


def _of_clock(host: str, asked: _Asked) -> Finding:
    before_s = time.time()
    try:
        there_s = asked.ask("time")
    except ClusterError as error:
        return Finding(host=host, tried="clock", result=str(error), kind="FAILED")
    after_s = time.time()
    differs_s = there_s - (before_s + after_s) / 2
    if abs(differs_s) <= _CLOCKS_S + (after_s - before_s):
        return Finding(host=host, tried="clock", result="as here")
    cure = "training does not depend on it, but times in records do: run an NTP client there"
    return Finding(host=host, tried="clock", result=f"{differs_s:+.1f} s: {cure}", kind="note")


def _of_folder(host: str, asked: _Asked, folder: str) -> Finding:
    try:
        with tempfile.NamedTemporaryFile("w", prefix=".nbdist-", dir=folder, encoding="utf-8") as file:
            file.write(mark := Path(file.name).name)
            file.flush()
            with contextlib.suppress(ClusterError):
                if asked.ask("read", file.name) == mark:
                    return Finding(host=host, tried="shared folder", result=f"{folder} is the same there")
    except OSError as error:
        return Finding(host=host, tried="shared folder", result=f"{folder}: {error.strerror}", kind="note")
    cure = "models and data travel nevertheless, but --checkpoint needs a folder that all hosts see (--folder DIR)"
    return Finding(host=host, tried="shared folder", result=f"{folder} is not the same there: {cure}", kind="note")


def _with_cure(text: str, host: str) -> str:
    found = next((cure for pattern, cure in _CURES if re.search(pattern, text, re.IGNORECASE)), "")
    return f"{text}: {found.format(host=host)}" if found else text
