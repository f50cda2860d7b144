"""Hosts made of namespaces on one machine, joined by a bridge, on which a command runs: ``head``, ``h1``, ``h2``, ...

    python tests/hosts/host_network.py [--hosts N] COMMAND...

Each host is a process that holds namespaces of its own (network, hostname, processes, mounts, IPC), with a private
/tmp, /dev/shm, /run and home folder, and an ssh server. One more namespace, the switch, holds the bridge, so that the
machine's own network is never touched. COMMAND runs on ``head``, in the present folder, which all hosts see, as over
NFS; it may cut, crash and slow hosts with `HostNetwork`, over a socket to this process. When it ends, all hosts do.

Needs root, iproute2, util-linux and openssh-server; exit status 77 says that this machine cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CONTROL_VARIABLE = "NBDIST_TEST_HOSTS"
CANNOT = 77
NETWORK = "10.77.0"
_UP_WITHIN_S = 30.0
_HOLD = "while :; do sleep 3600 & wait; done"  # as the first process it also reaps what loses its parent
_HOST = f"""
set -e
hostname "$NAME"
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt && mkdir /mnt/shared /mnt/upper /mnt/work
mount --bind "$SHARED" /mnt/shared && mount --bind "$FOLDER" /srv  # before /tmp is covered
mount -t tmpfs -o size=1g tmpfs /dev/shm && mount -t tmpfs tmpfs /run && mkdir -p /run/sshd
mount -t overlay -o lowerdir=/root,upperdir=/mnt/upper,workdir=/mnt/work overlay /root
mount -t tmpfs tmpfs /tmp && mkdir -p "$SHARED" && mount --bind /mnt/shared "$SHARED"
rm -rf /root/.ssh /root/.ipython /root/.local/state && mkdir -p /root/.ssh
cp /srv/key /root/.ssh/id_ed25519 && cp /srv/key.pub /root/.ssh/authorized_keys && chmod 600 /root/.ssh/*
cp /srv/known_hosts /root/.ssh/known_hosts
mount --bind /srv/hosts /etc/hosts
ip link set lo up
/usr/sbin/sshd -f /dev/null -h /root/.ssh/id_ed25519 -o PermitRootLogin=prohibit-password \\
    -o PasswordAuthentication=no -o UsePAM=no -o StrictModes=no -o PidFile=none -o MaxStartups=100 -E /srv/$NAME.sshd
touch /run/up
{_HOLD}
"""


class HostNetwork:
    """What a command on ``head`` does to the hosts; sent to the process that holds them."""

    def __init__(self, control: str) -> None:
        self._control = control

    @property
    def names(self) -> list[str]:
        """The hosts beside ``head``."""
        return list(self._send("names"))

    def cut(self, host: str) -> None:
        """A partition: its cable leads nowhere any more, and nobody is told."""
        self._send("cut", host)

    def unplug(self, host: str) -> None:
        """Its link goes down: both ends see that."""
        self._send("unplug", host)

    def crash(self, host: str) -> None:
        """All its processes are gone at once, without a word on the network."""
        self._send("crash", host)

    def mend(self) -> None:
        """Undo all of that, and every rate; a crashed host starts again, empty."""
        self._send("mend")

    def rate(self, host: str, rate: str) -> None:
        """Limit its link, both ways, such as to ``100mbit``."""
        self._send("rate", host, rate)

    def bytes(self, host: str) -> tuple[int, int]:
        """Bytes that it has sent and received."""
        sent, received = self._send("bytes", host)
        return sent, received

    def run(self, host: str, command: str) -> str:
        """Run a shell command on a host, without the network; returns its output, whatever its exit status."""
        return str(self._send("run", host, command))

    def processes(self, host: str) -> dict[int, str]:
        """The processes there of which nbdist's name or command is part: pid on that host and command."""
        lines = self.run(host, "ps -eww -o pid=,comm=,args=").splitlines()
        found = {}
        for line in lines:
            pid, _, command = line.strip().partition(" ")
            if "nbdist" in command and "host_network.py" not in command and "pytest" not in command:
                found[int(pid)] = command.strip()
        return found

    def _send(self, *request: str) -> Any:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(self._control)
            peer.sendall(json.dumps(request).encode() + b"\n")
            with peer.makefile() as answer:
                result, error = json.loads(answer.readline())
        if error:
            raise RuntimeError(error)
        return result


class _Holder:
    """Holds the hosts."""

    def __init__(self, count: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nbdist-hosts-"))
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self._held: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        self.control = str(self.folder / "control")
        self._listener = socket.socket(socket.AF_UNIX)

    def up(self) -> None:
        """Start all hosts."""
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throwaway", "-f", str(self.folder / "key"))
        addresses = [f"{_address(name)} {name}\n" for name in ("head", *self.names)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses))
        key, public, _ = (self.folder / "key.pub").read_text().split()
        (self.folder / "known_hosts").write_text(f"* {key} {public}\n")  # every host shows this one
        self._hold("switch", _HOLD)
        self._on_switch("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self._on_switch("ip", "link", "set", "br0", "up")
        for name in ("head", *self.names):
            self._start(name)
        self._listener.bind(self.control)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def down(self) -> None:
        """End all hosts."""
        self._listener.close()
        for holder, first in self._held.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, 9)  # the first process of its namespace: all others go with it
            holder.kill()
            holder.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def inside(self, name: str) -> list[str]:
        """The beginning of a command that runs on a host."""
        return ["nsenter", "-t", str(self._held[name][1]), "-m", "-u", "-i", "-n", "-p", "-w" + os.getcwd(), "--"]

    def _hold(self, name: str, script: str) -> None:
        """Start a process that holds namespaces, which end with this program's."""
        environment = {**os.environ, "NAME": name, "FOLDER": str(self.folder), "SHARED": os.getcwd()}
        with open(self.folder / f"{name}.log", "wb") as log:
            holder = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                 "--kill-child", "--mount-proc", "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + _UP_WITHIN_S
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        while not (first := children.read_text().split() if children.exists() else []):
            if holder.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"no namespaces here: {(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.01)
        self._held[name] = holder, int(first[0])

    def _start(self, name: str) -> None:
        self._hold(name, _HOST)
        first = str(self._held[name][1])
        ends = ["type", "veth", "peer", "name", "eth0", "address", _hardware_address(name), "netns", first]
        self._on_switch("ip", "link", "add", f"v-{name}", *ends)
        self._on_switch("ip", "link", "set", f"v-{name}", "master", "br0", "up")
        # Not its mounts: those of a host without a /proc yet could not run this.
        on_network = ["nsenter", "-t", first, "-n", "--"]
        run(*on_network, "ip", "address", "add", f"{_address(name)}/24", "dev", "eth0")
        run(*on_network, "ip", "link", "set", "eth0", "up")
        deadline = time.monotonic() + _UP_WITHIN_S
        while subprocess.run(
            [*self.inside(name), "test", "-e", "/run/up"], capture_output=True, check=False
        ).returncode:
            if time.monotonic() > deadline or self._held[name][0].poll() is not None:
                raise OSError(f"host {name} did not start: {(self.folder / f'{name}.log').read_text()}")
            time.sleep(0.02)

    def _on_switch(self, *command: str) -> str:
        return run("nsenter", "-t", str(self._held["switch"][1]), "-n", "--", *command)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._answer(peer)  # in this thread: the hosts end with the one that has started them

    def _answer(self, peer: socket.socket) -> None:
        with peer, peer.makefile() as lines:
            kind, *arguments = json.loads(lines.readline())
            try:
                answer = getattr(self, f"_do_{kind}")(*arguments), ""
            except Exception as error:
                answer = None, f"{kind} {arguments}: {error} {getattr(error, 'stderr', '')}"
            peer.sendall(json.dumps(answer).encode() + b"\n")

    def _do_names(self) -> list[str]:
        return self.names

    def _do_cut(self, name: str) -> None:
        self._on_switch("ip", "link", "set", f"v-{name}", "nomaster")

    def _do_unplug(self, name: str) -> None:
        self._on_switch("ip", "link", "set", f"v-{name}", "down")

    def _do_crash(self, name: str) -> None:
        self._do_cut(name)  # first: dying sockets would still send their last words
        holder, first = self._held.pop(name)
        os.kill(first, 9)
        holder.wait()
        with contextlib.suppress(subprocess.CalledProcessError):
            self._on_switch("ip", "link", "delete", f"v-{name}")

    def _do_mend(self) -> None:
        for name in self.names:
            if name not in self._held:
                self._start(name)
            self._on_switch("ip", "link", "set", f"v-{name}", "master", "br0", "up")
        for name in ("head", *self.names):
            self._do_rate(name, "")

    def _do_rate(self, name: str, rate: str) -> None:
        ends = (["nsenter", "-t", str(self._held["switch"][1]), "-n", "--"], f"v-{name}"), (self.inside(name), "eth0")
        for inside, link in ends:
            subprocess.run([*inside, "tc", "qdisc", "delete", "dev", link, "root"], capture_output=True, check=False)
            if rate:  # a smaller burst would drop the large packets that these links hand over
                shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
                run(*inside, "tc", "qdisc", "add", "dev", link, "root", *shape)

    def _do_bytes(self, name: str) -> tuple[int, int]:
        (link,) = json.loads(self._on_switch("ip", "-j", "-s", "link", "show", f"v-{name}"))
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    def _do_run(self, name: str, command: str) -> str:
        if name not in self._held:  # it has crashed
            return ""
        ended = subprocess.run([*self.inside(name), "sh", "-c", command], capture_output=True, text=True, check=False)
        return ended.stdout + ended.stderr


def _address(name: str) -> str:
    return f"{NETWORK}.{1 if name == 'head' else 10 + int(name[1:])}"


def _hardware_address(name: str) -> str:
    """The same for a host that starts again: others may still know it."""
    return f"02:00:00:00:00:{1 if name == 'head' else 10 + int(name[1:]):02x}"


def run(*command: str) -> str:
    """Run a command; returns its output."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise subprocess.CalledProcessError(ended.returncode, command, ended.stdout, ended.stderr)
    return ended.stdout


def main() -> int:
    """Run a command on a new network of hosts; returns its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    needed = ("unshare", "nsenter", "setpriv", "ip", "tc", "ssh", "ssh-keygen", "/usr/sbin/sshd")
    missing = [program for program in needed if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        print(f"no hosts can be made here: {f'{missing[0]} is missing' if missing else 'this needs root'}")
        return CANNOT
    holder = _Holder(arguments.hosts)
    try:
        try:
            holder.up()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no hosts can be made here: {error} {getattr(error, 'stderr', '')}")
            return CANNOT
        environment = {**os.environ, CONTROL_VARIABLE: "/srv/control"}
        return subprocess.run([*holder.inside("head"), *arguments.command], env=environment, check=False).returncode
    finally:
        holder.down()


if __name__ == "__main__":
    sys.exit(main())
