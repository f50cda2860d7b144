"""Slurm: the job whose nodes are the hosts, and how agents are started on them, one step a node.

Inside a job the notebook uses that one. Outside it asks for one, which ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.allocation import Allocation
from nbdist.cluster.hosts.host_choice import LOCAL
from nbdist.errors import ClusterError, PlanError
from nbdist.telemetry.host import host_name

__all__ = ["Slurm", "SlurmJob", "check_slurm", "own_job"]

_HELD = """scontrol show hostnames "$SLURM_JOB_NODELIST" && printf '\\n' && exec cat > /dev/null"""
_HOLDS = """
exec 3<&0
salloc "$@" <&3 & job=$!
(cat <&3; for try in $(seq 25); do kill -HUP $job || exit; sleep 0.2; done; kill -KILL $job) > /dev/null 2>&1 &
wait $job
"""
"""A shell's program: the job, or its place in the queue, is given up once the standard input ends.

SIGTERM lets salloc cancel the job, and then it may wait for ever for a command that ends meanwhile: its other thread,
which learns that the job is over, takes the command's exit status. SIGHUP ends that wait.
"""
_LOOK_S, _ASK_EVERY_S, _ASKED_WITHIN_S = 0.1, 2.0, 10.0
_KILLED = 128 + signal.SIGKILL
"""The exit status of a shell whose last program was killed."""
_SOON_S, _LIMIT_EVERY_S = 120.0, 60.0
"""How long before its time limit a job ends soon, and how often that is looked up at most."""


@dataclass(frozen=True, kw_only=True)
class Slurm(AgentLauncher):
    """See `AgentLauncher`.

    Args:
        job: The id of the job whose nodes the hosts are.
    """

    job: str

    def command_on(self, host: str, line: str) -> list[str]:
        """See `AgentLauncher`. The step may use all that the job has on its node, beside other steps."""
        one_task = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap", "--cpu-bind=none", "--mem=0"]
        return ["srun", f"--jobid={self.job}", *one_task, "--unbuffered", "--quiet", "sh", "-c", line]


class SlurmJob(Allocation):
    """A job, whose nodes are the hosts.

    Args:
        job: Its id.
        nodes: Their names; `LOCAL` for this host.
        program: What holds the job, if it was asked for here.
    """

    def __init__(self, job: str, nodes: Sequence[str], program: subprocess.Popen[str] | None = None) -> None:
        super().__init__(dict.fromkeys(nodes), Slurm(job=job))
        self._job, self._program = job, program
        self._ended = threading.Event()
        self._on_term: Any = None
        if own_job() and threading.current_thread() is threading.main_thread():
            self._on_term = signal.signal(signal.SIGTERM, self._note_termination)
        threading.Thread(target=self._watch, daemon=True, name="nbdist-slurm").start()

    @classmethod
    def begin(
        cls, nodes: int | None, engines: int | None, arguments: Sequence[str], report: Callable[[str], None]
    ) -> SlurmJob:
        """The job that this process is in, else a new one, once it has begun.

        An interrupt withdraws the new one.

        Args:
            nodes: How many; None for all of the present job, or one.
            engines: How many in all, for which a new job gets a core each; None leaves that to `arguments`.
            arguments: For ``salloc``.
            report: Progress callback: is told while the job waits, and why.

        Raises:
            PlanError: The present job has fewer nodes.
            ClusterError: Slurm refuses the new one.
        """
        if own_job():
            return cls._present(nodes)
        sizes = [f"--nodes={nodes or 1}", *([] if engines is None else [f"--ntasks={engines}"])]
        wanted = ["--no-kill", "--job-name=nbdist", *sizes, *arguments]  # a lost node must not end the others
        command = ["sh", "-c", _HOLDS, "sh", *wanted, "sh", "-c", _HELD]
        program = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            return cls(*_granted(program, report), program)
        except BaseException:
            _end(program)
            raise

    @classmethod
    def _present(cls, nodes: int | None) -> SlurmJob:
        found = _ask("scontrol", "show", "hostnames", os.environ.get("SLURM_JOB_NODELIST", "")).split()
        if nodes is not None and nodes > len(found):
            raise PlanError(f"{nodes} nodes are more than job {own_job()} has, which is {len(found)}: use fewer.")
        here = host_name().partition(".")[0]
        names = [LOCAL if name.partition(".")[0] == here else name for name in found]
        names.sort(key=lambda name: name != LOCAL)
        return cls(own_job(), names[:nodes])

    def _watch(self) -> None:
        """Look when its time ends, until it does."""
        while not self.ending:
            left_s = _seconds(_ask("squeue", "--noheader", f"--jobs={self._job}", "--format=%L").strip())
            if left_s is not None and left_s <= _SOON_S:
                self.ending = f"job {self._job} of Slurm ends in {left_s:.0f} s, its time limit"
            if self._ended.wait(_LIMIT_EVERY_S if left_s is None else min(_LIMIT_EVERY_S, max(1.0, left_s - _SOON_S))):
                return

    def _note_termination(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM for this process, which is in the job: the first one during a run only notes it."""
        first, self.ending = not self.ending, f"job {self._job} of Slurm got SIGTERM, as before its end"
        if not (first and self.held):
            signal.signal(number, self._on_term or signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def end(self) -> None:
        """See `Allocation`."""
        self._ended.set()
        if threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGTERM) == self._note_termination
        ):
            signal.signal(signal.SIGTERM, self._on_term or signal.SIG_DFL)
        if self._program is not None and _end(self._program) == _KILLED:
            _ask("scancel", self._job)


def check_slurm(arguments: Sequence[str], detach: bool) -> None:
    """Raise `PlanError` if no job can be used or asked for like that. Asks nobody.

    Args:
        arguments: For ``salloc``.
        detach: Whether the engines outlive this kernel.
    """
    if shutil.which("salloc") is None:
        raise PlanError("there is no salloc here: start the notebook on a host of a Slurm cluster, or use ssh.")
    if own_job() and arguments:
        raise PlanError(
            f"launcher_args ({' '.join(arguments)}) are for a new job, and this notebook is in job {own_job()}: "
            "omit them."
        )
    if detach and not own_job():
        raise PlanError(
            "a job that nbdist asks for ends with the kernel: for engines that outlive it (detach), start the notebook "
            "inside a job."
        )


def own_job() -> str:
    """The id of the job that this process is in; empty outside of one."""
    return os.environ.get("SLURM_JOB_ID", "")


def _granted(program: subprocess.Popen[str], report: Callable[[str], None]) -> tuple[str, list[str]]:
    """The id and the nodes of a job, once it has begun."""
    assert program.stdout is not None
    assert program.stderr is not None
    written: list[str] = []
    nodes: list[str] = []
    threads = [
        threading.Thread(target=_collect, args=(stream, lines), daemon=True)
        for stream, lines in ((program.stderr, written), (program.stdout, nodes))
    ]
    for thread in threads:
        thread.start()
    began_s, asked_s = time.monotonic(), -_ASK_EVERY_S
    while "" not in nodes:
        if program.poll() is not None:
            for thread in threads:
                thread.join()
            lines = [line.removeprefix("salloc: ").removeprefix("error: ") for line in written if line]
            raise ClusterError(f"Slurm gives no job: {' '.join(lines).rstrip('.') or f'exit {program.returncode}'}.")
        if (job := _job_of(written)) and time.monotonic() - asked_s > _ASK_EVERY_S:
            asked_s = time.monotonic()
            waited = f"{asked_s - began_s:.0f} s"
            report(f"job {job} waits in the queue for {waited}{_reason(job)}: interrupt to withdraw it")
        time.sleep(_LOOK_S)
    return _job_of(written), nodes[: nodes.index("")]


def _collect(stream: IO[str], lines: list[str]) -> None:
    with stream:
        lines.extend(line.rstrip("\n") for line in stream)


def _job_of(written: Sequence[str]) -> str:
    """The id of a job in what salloc has written."""
    words = [line.split() for line in written if " job allocation " in f"{line} "]
    return next((each[-1] for each in reversed(words) if each[-1].isdigit()), "")


def _reason(job: str) -> str:
    """Why a job waits, and until when, in a clause."""
    state, _, rest = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T|%r|%S").strip().partition("|")
    reason, _, begins = rest.partition("|")
    if state != "PENDING":
        return ""
    expected = f", expected to begin at {begins}" if begins not in ("", "N/A") else ""
    return f" ({reason}{expected})"


def _seconds(time_left: str) -> float | None:
    """Slurm's ``days-hours:minutes:seconds`` in seconds; None for another word, as without a limit."""
    days, _, rest = time_left.rpartition("-")
    parts = [days or "0", *["0"] * (2 - rest.count(":")), *rest.split(":")]
    if not all(part.isdigit() for part in parts):
        return None
    return sum(int(part) * unit for part, unit in zip(parts, (86400, 3600, 60, 1), strict=True))


def _ask(*command: str) -> str:
    """What a program of Slurm's says; empty if it fails."""
    if shutil.which(command[0]) is None:
        return ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ASKED_WITHIN_S)
        return asked.stdout
    return ""


def _end(program: subprocess.Popen[str]) -> int:
    """Let salloc end, which gives the job back, or be killed if it does not; returns the exit status."""
    assert program.stdin is not None
    with contextlib.suppress(OSError):
        program.stdin.close()
    return program.wait()
