"""Slurm on the hosts of a `HostNetwork`: munged and slurmctld on ``head``, a slurmd on every other host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
from host_network import HostNetwork

CONF = "/srv/slurm/slurm.conf"
"""The configuration, for ``$SLURM_CONF``."""
_FOLDER = Path("/srv")  # which all hosts see
_UP_WITHIN_S = 60.0
_CONF = """
ClusterName=hosts
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/srv/munge/socket
StateSaveLocation=/srv/slurm/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/srv/slurm/slurmctld.log
SlurmdLogFile=/srv/slurm/slurmd-%h.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=3
InactiveLimit=0
KillWait=2
NodeName={nodes} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def installed() -> bool:
    """Whether Slurm is."""
    return all(shutil.which(name) or Path("/usr/sbin", name).exists() for name in ("slurmctld", "slurmd", "munged"))


class SlurmHosts:
    """Slurm's daemons, between `up` and `down`.

    Args:
        network: The hosts.
    """

    def __init__(self, network: HostNetwork) -> None:
        self._network = network

    def up(self) -> None:
        """Start them; every node is idle when this returns."""
        shutil.rmtree(_FOLDER / "slurm", ignore_errors=True)
        for name in ("slurm/state", "munge"):
            (_FOLDER / name).mkdir(parents=True, exist_ok=True)
        (_FOLDER / "munge" / "key").write_bytes(os.urandom(128))
        (_FOLDER / "munge" / "key").chmod(0o600)
        Path(CONF).write_text(_CONF.format(nodes=",".join(self._network.names)))
        subprocess.run(  # it insists on folders of its own user, and else says so and goes on
            ["munged", "--force", "--key-file=/srv/munge/key", "--socket=/srv/munge/socket",
             "--pid-file=/run/munged.pid", "--log-file=/srv/munge/log", "--seed-file=/run/munged.seed",
             "--num-threads=2"],
            check=True, capture_output=True,
        )  # fmt: skip
        subprocess.run(["slurmctld", "-f", CONF], check=True)
        self.start_nodes()

    def start_nodes(self) -> None:
        """Start the daemon of each node on which it does not run, as after a crash."""
        for name in self._network.names:
            self._network.run(name, f"pgrep -x slurmd || slurmd -f {CONF}")
        deadline = time.monotonic() + _UP_WITHIN_S
        while len(self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < len(self._network.names):
            assert time.monotonic() < deadline, self.ask("sinfo", "-N", "-l")
            time.sleep(0.05)

    def down(self) -> None:
        """End them, and all jobs."""
        self.ask("scancel", "--user=root")
        for name in self._network.names:
            self._network.run(name, "pkill -x slurmstepd; pkill -x slurmd")
        for name in ("slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(Path("/run", f"{name}.pid").read_text()), signal.SIGKILL)

    @property
    def nodes(self) -> list[str]:
        """Their names."""
        return self._network.names

    @property
    def jobs(self) -> list[str]:
        """The state of each job that has not ended."""
        return self.ask("squeue", "-h", "-o", "%T").split()

    def ask(self, *command: str) -> str:
        """The output of one of Slurm's programs."""
        environment = {**os.environ, "SLURM_CONF": CONF}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout


def asking() -> list[psutil.Process]:
    """The processes of this host that ask Slurm for a job, or hold one."""
    return [process for process in psutil.process_iter(["name"]) if process.info["name"] == "salloc"]
