"""A cluster for chaos trials: disturbs a run there, and compares its results with those of an undisturbed one."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import workloads
from gate import Gate
from shared_cluster import marked, until
from torch import nn
from traps import Traps
from workloads import digest, history, optimizer_digest

import nbdist
from nbdist.errors import EngineError, NbdistError

RANKS = 3
ENDED_WITHIN_S = 240.0  # longer is a hang, on any machine; what it really took stands in the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """The result of one run.

    Args:
        problem: What differs from an undisturbed run; empty if nothing does.
        seconds: The time of each recovery, or until the error was raised, or until the run had stopped.
    """

    problem: str
    seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The final state of a run, as digests and counts."""

    weights: str
    optimizer: str
    history: list[dict[str, Any]]

    def differs(self, other: State) -> str:
        """The names of the fields that differ; empty if none."""
        return ", ".join(
            field.name for field in dataclasses.fields(self) if getattr(self, field.name) != getattr(other, field.name)
        )


class Lab:
    """A cluster with a spare, and the results of its workloads without a disturbance.

    Args:
        channel: "shared memory" or "process group".
        cluster: A running one, which is not stopped; by default a new one.
        ranks: Of a new one.
        device: Of a new one; on GPUs ranks use gloo or nccl, whatever `channel` says.
    """

    def __init__(
        self, channel: str, cluster: nbdist.Cluster | None = None, *, ranks: int = RANKS, device: str = "cpu"
    ) -> None:
        self.channel = channel
        self.ranks = ranks
        self._references: dict[Any, State] = {}
        self._weights: dict[tuple[str, int], str] = {}
        self._cleanup = contextlib.ExitStack()
        self.folder = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        if cluster is None:
            with _environment(NBDIST_CHANNEL="process_group" if channel == "process group" else None):
                cluster = self._cleanup.enter_context(nbdist.Cluster(ranks, device=device, spares=1))
                until(lambda: cluster.spare_engines)
        self.cluster = cluster
        self._before: _Left | None = None

    def close(self) -> None:
        """End the cluster."""
        self._cleanup.close()

    def settle(self) -> None:
        """Wait until all engines are idle, and the spares are ready."""
        until(lambda: len(self.cluster.spare_engines) >= self.cluster.spares)

    def new_folder(self) -> str:
        """An empty folder."""
        return tempfile.mkdtemp(dir=self.folder)

    def pids(self) -> list[int]:
        """The processes of the ranks."""
        return [engine.pid for engine in self.cluster.engines]

    def make(self, workload: str, **more: Any) -> tuple[Traps, nn.Module, Any, dict[str, Any]]:
        """A workload and its traps, none of which is set."""
        traps = Traps(self.new_folder())
        model, data, options = workloads.make(workload, traps)
        return traps, model, data, {**options, **more}

    def reference(self, workload: str, *, disk: bool = False, **more: Any) -> State:
        """The final state of a workload without a disturbance."""
        key = workload, disk, repr(sorted(more.items()))
        if key not in self._references:
            if disk:
                more["checkpoint"] = self.new_folder()
            traps, model, data, options = self.make(workload, **more)
            self._references[key] = state_of(self.cluster.train(model, data, **options), model, options)
            self.tidy(traps, options)
        return self._references[key]

    def tidy(self, traps: Traps, options: dict[str, Any]) -> None:
        """Remove the folders of a trial."""
        for folder in (traps.folder, options.get("checkpoint")):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def survives(
        self,
        workload: str,
        *traps_set: tuple[Any, ...],
        meanwhile: Callable[[Any, Traps], None] = lambda run, traps: None,
        disk: bool = False,
        held: tuple[int, ...] = (),
        **more: Any,
    ) -> Trial:
        """Let a run lose ranks; it should end like an undisturbed one.

        Args:
            workload: Its name.
            *traps_set: Arguments of `Traps.set`.
            meanwhile: Called when the run has started.
            disk: Whether it writes checkpoints, and its state is taken from there.
            held: After which steps every rank is held, at a `Gate` in the traps' folder which `meanwhile` opens.
            **more: Options of the training.
        """
        expected = self.reference(workload, disk=disk, **more)
        if disk:
            more["checkpoint"] = self.new_folder()
        self.settle()
        traps, model, data, options = self.make(workload, **more)
        for trap in traps_set:
            traps.set(*trap)
        if held:
            options["lr_scheduler"] = Gate(traps.folder, *held, scheduler=options["lr_scheduler"])
        run = self.cluster.train(model, data, background=True, **options)
        try:
            meanwhile(run, traps)
            ended = run.wait(ENDED_WITHIN_S).ended
        except NbdistError as error:
            return Trial(problem=f"failed: {error}")
        if not ended:
            return Trial(problem=self._end_anyhow(run))
        problems = [state_of(run, model, options).differs(expected), ", ".join(traps.left)]
        if run.state != "finished":
            problems.append(run.state)
        seconds = traps.recovery_seconds()
        self.tidy(traps, options)
        return Trial(problem="; ".join(filter(None, problems)), seconds=seconds)

    def _end_anyhow(self, run: Any) -> str:
        """End a run that does not end by itself, so that the suite can continue; returns its state as text."""
        text = f"did not end within {ENDED_WITHIN_S:g} s: {run.progress.state}, {run.progress.notes}, {self.pids()}"
        run.stop(now=True)
        with contextlib.suppress(EngineError):
            if not run.wait(ENDED_WITHIN_S).ended:
                text += "; nor by stop(now=True)"
                self.cluster.stop()
                self.cluster.start()
        return text

    def fails(self, workload: str, phase: str, rank: Any, step: int, **more: Any) -> Trial:
        """Let user code raise on a rank: one error, living engines, weights of the step it names; then resume."""
        expected = self.reference(workload)
        self.settle()
        traps, model, data, options = self.make(workload, **more)
        before, pids = digest(model.state_dict()), self.pids()
        self.cluster.push(mark=phase)
        traps.set(phase, rank, step, "raise")
        run = self.cluster.train(model, data, background=True, **options)
        problems, text = [], ""
        try:
            problems.append("no error" if run.wait(ENDED_WITHIN_S).ended else self._end_anyhow(run))
        except EngineError as error:
            text = str(error)
            if rank != "any" and error.rank != rank:
                problems.append(f"rank {error.rank} in place of {rank}")
        seconds = [time.time() - raised_s for raised_s in traps.times_s("raised")]
        if not re.search(rf"rank.*Trapped: trapped in {phase}.*traps.py\W+line \d+", text, re.S):
            problems.append(f"error {text!r}")
        if not seconds:
            problems.append("it was never raised")
        if self.pids() != pids or {engine.state for engine in self.cluster.engines} != {"idle"}:
            problems.append("engines are not what they were")
        elif any(self.cluster.pull("mark", rank) != phase for rank in range(self.ranks)):
            problems.append("definitions are lost")
        named = re.search(r"weights after step (\d+)", text)
        problems += self._keeps(workload, traps, model, options, expected, int(named[1]) if named else 0, before)
        self.tidy(traps, options)
        return Trial(problem="; ".join(filter(None, problems)), seconds=seconds)

    def stops(
        self, workload: str, rng: random.Random, *traps_set: tuple[Any, ...], now: bool = False, epochs: int = 2
    ) -> Trial:
        """Stop a run at a random moment, or once a rank hangs; then resume from its last state."""
        expected = self.reference(workload, epochs=epochs)
        self.settle()
        traps, model, data, options = self.make(workload, epochs=epochs)
        before = digest(model.state_dict())
        for trap in traps_set:
            traps.set(*trap)
        run = self.cluster.train(model, data, background=True, **options)
        if traps_set:
            until(lambda: not traps.left)
        run.wait(rng.uniform(0.0, 0.15 * epochs / 2))
        stopped_s = time.monotonic()
        run.stop(now=now)
        problems = []
        try:
            if not run.wait(ENDED_WITHIN_S).ended:
                problems.append(self._end_anyhow(run))
        except NbdistError as error:
            problems.append(f"failed: {error}")
        seconds = [time.monotonic() - stopped_s]
        if run.state == "stopped":
            problems += self._keeps(workload, traps, model, options, expected, run.progress.step, before)
        elif run.state != "finished" or traps_set:
            problems.append(run.state)
        self.tidy(traps, options)
        return Trial(problem="; ".join(filter(None, problems)), seconds=seconds)

    def _keeps(
        self, workload: str, traps: Traps, model: nn.Module, options: dict[str, Any], expected: State, step: int,
        before: str,
    ) -> list[str]:  # fmt: skip
        """Whether the notebook's model is that of an undisturbed run of so many steps, and resumes there."""
        problems = []
        whole, weights = digest(model.state_dict()), digest(dict(model.named_parameters()))
        traps.clear()
        last = nbdist.last_run()
        assert last is not None
        try:
            if step == last.progress.steps_total:  # it was stopped when all was done but bringing the weights home
                differs = "weights" if whole != expected.weights else ""
            elif step == 0:  # nothing was kept, so there is nothing to go on from
                arguments = {key: value for key, value in last.control.arguments.items() if key != "resume"}
                again = self.cluster.train(arguments.pop("model"), arguments.pop("data"), **arguments)
                differs = state_of(again, model, options).differs(expected)
            else:
                differs = state_of(self.cluster.resume(), model, options).differs(expected)
            problems.append(f"afterwards: {differs}" if differs else "")
        except NbdistError as error:
            reached = [(rank.step, rank.state) for rank in last.progress.ranks.values()]
            problems.append(f"cannot go on after step {step}: {error}, {last.state}, {reached}, {last.error}")
        if "keep_best" in options:  # then it holds those of the best epoch
            return problems
        # Of weights only: buffers are averaged at the end of an epoch, which a run of so many steps does not have.
        if (whole != before) if step == 0 else (weights != self._weights_after(workload, step)):
            problems.append(f"not the weights of step {step}")
        return problems

    def _weights_after(self, workload: str, step: int) -> str:
        if (workload, step) not in self._weights:
            traps, model, data, options = self.make(workload, steps=step)
            for name in ("epochs", "keep_best", "each_epoch"):
                options.pop(name, None)
            self.cluster.train(model, data, **options)
            self._weights[workload, step] = digest(dict(model.named_parameters()))
            self.tidy(traps, options)
        return self._weights[workload, step]

    def begin_watching(self) -> None:
        """Remember what there is, now that everything has been used once."""
        self.settle()
        self._before = _Left.now()

    def left_behind(self) -> str:
        """What there is now that was not there before."""
        self.settle()
        before = self._before
        assert before is not None
        with contextlib.suppress(AssertionError):  # reported below
            until(lambda: not _Left.now().more_than(before))
        self._before = _Left.now()  # reported only once
        return self._before.more_than(before)


def state_of(run: Any, model: nn.Module, options: dict[str, Any]) -> State:
    """The final state of a run."""
    return State(weights=digest(model.state_dict()), optimizer=optimizer_digest(run, options), history=history(run))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Left:
    """What the processes of a suite have on this machine.

    Args:
        processes: What they are.
        listening: The port, and the process, of each of their sockets that listens.
        shared: Names in /dev/shm.
        folders: Our names in the temporary folder.
        files: What this process has open, by kind.
    """

    processes: tuple[str, ...]
    listening: frozenset[tuple[int, str]]
    shared: frozenset[str]
    folders: frozenset[str]
    files: collections.Counter[str]

    @classmethod
    def now(cls) -> _Left:
        gc.collect()  # an error that was caught above holds what its frames held
        listening = set()
        processes = [psutil.Process(), *marked()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found = process.net_connections("inet")
                listening |= {(c.laddr.port, _described(process)) for c in found if c.status == psutil.CONN_LISTEN}
        return cls(
            processes=tuple(filter(None, map(_described, processes))), listening=frozenset(listening),
            shared=frozenset(os.listdir("/dev/shm")),
            folders=frozenset(path.name for path in Path(tempfile.gettempdir()).glob("nbdist-*")),
            files=_open_files(),
        )  # fmt: skip

    def more_than(self, before: _Left) -> str:
        """What has been added; empty if nothing."""
        problems = []
        if len(self.processes) > len(before.processes):
            problems.append(f"{len(self.processes)} processes in place of {len(before.processes)}: {self.processes}")
        if len(self.listening) > len(before.listening):
            new = ", ".join(f"{port} of {process}" for port, process in sorted(self.listening - before.listening))
            problems.append(f"{len(self.listening)} listening sockets in place of {len(before.listening)}: {new}")
        problems += [
            f"{name} is left" for name in sorted((self.shared | self.folders) - before.shared - before.folders)
        ]
        return ", ".join(problems)


def _described(process: psutil.Process) -> str:
    try:
        words = [word.rpartition("/")[2] for word in process.cmdline()]
        return f"{process.pid} of {process.ppid()}, {process.status()}: {' '.join(words)[-60:]}"
    except psutil.NoSuchProcess:
        return ""


def _open_files() -> collections.Counter[str]:
    kinds: collections.Counter[str] = collections.Counter()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one by which we look
            kinds[re.sub(r"\d+", "N", os.readlink(path))] += 1
    return kinds


@contextlib.contextmanager
def _environment(**variables: str | None):
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
