"""Chaos scenarios of a whole session: its kernel, controller and disk; and the same workload under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from gate import Gate
from lab import ENDED_WITHIN_S, RANKS, Lab, Trial
from shared_cluster import MARK, until
from traps import PHASES, Traps
from workloads import MESHES, STEPS, WORKLOADS, digest, history

import nbdist
from nbdist.cluster import detached_clusters
from nbdist.errors import ClusterError

SESSION = [sys.executable, str(Path(__file__).with_name("session.py"))]
GONE_WITHIN_S = ENDED_WITHIN_S
DISK_MIB = 10  # room for some checkpoints of the workload, until the rest is filled
DETACHED_EPOCHS = 10
SCALED_EPOCHS = 40
SCALED_APART = 7  # steps between two scale commands, at least: the first is done before the second is given
ANSWERED = 3  # within so many steps; those after them are done by the new number
RESTARTS = 2
Result = tuple[tuple[str, str], Trial]
"""The event and the channel, and a trial of it."""


def kernel_killed(rng: random.Random) -> Iterator[Result]:
    """Everything that the kernel started, directly or not, ends."""
    for state in ("idle", "busy") * 2:
        with tempfile.TemporaryDirectory() as folder:
            mark = f"{os.getpid()} {state} {folder}"
            kernel = subprocess.Popen(
                [*SESSION, "kernel", folder, state],
                stdin=subprocess.PIPE,
                env={**os.environ, MARK: mark, "TMPDIR": folder},
            )
            try:
                until(Path(folder, "ready").exists)
                processes = _marked(mark)
                kernel.kill()
                kernel.wait()
                killed_s = time.monotonic()
                _, left = psutil.wait_procs(processes, GONE_WITHIN_S)
                seconds = time.monotonic() - killed_s
                files = list(Path(folder).glob("nbdist-*"))
                problems = [f"left running: {left}"] * bool(left) + [f"left: {files}"] * bool(files)
                if len(processes) < 2 * RANKS:
                    problems.append(f"only {processes} had been started")
                yield (
                    ("the kernel is killed: until all is gone", "shared memory"),
                    Trial(problem="; ".join(problems), seconds=[seconds]),
                )
            finally:
                for process in _marked(mark):
                    process.kill()


def kernel_replaced(rng: random.Random) -> Iterator[Result]:
    """A detached cluster: the kernel is killed at a random step, or a rank with it, and another one attaches.

    Timed from the start of `attach` until the run is monitored again.
    """
    event = "the kernel is killed{}, another one attaches"
    for ranks, workload in ((RANKS, "shared weights"), *((4, mesh) for mesh in MESHES)):
        lab = Lab("shared memory", ranks=ranks)
        try:
            expected = lab.reference(workload, epochs=DETACHED_EPOCHS)
        finally:
            lab.close()
        for also in ("", " and a rank"):
            where = "shared memory" if workload not in MESHES else workload
            with tempfile.TemporaryDirectory() as folder:
                yield (event.format(also), where), _replaced(folder, workload, rng, bool(also), expected)


def _replaced(folder: str, workload: str, rng: random.Random, also_a_rank: bool, expected: Any) -> Trial:
    mark, step, gate = f"{os.getpid()} {folder}", rng.randrange(1, 8 * DETACHED_EPOCHS), Gate(folder)
    words = [*SESSION, "detached", folder, workload, str(DETACHED_EPOCHS), str(step)]
    kernel = subprocess.Popen(words, stdin=subprocess.PIPE, env={**os.environ, MARK: mark})
    try:
        until(Path(folder, "ready").exists)
        processes = _marked(mark)
        kernel.kill()
        kernel.wait()
        if also_a_rank:
            os.kill(int(rng.choice(Path(folder, "pids").read_text().split())), signal.SIGKILL)
        gate.open()  # the run continues without a kernel
        until(lambda: any(not cluster.owner for cluster in detached_clusters()))
        names: dict[str, Any] = {}
        start_s = time.monotonic()
        with nbdist.Cluster.attach(namespace=names):
            seconds = time.monotonic() - start_s
            run = nbdist.last_run().wait(ENDED_WITHIN_S)
            same = (digest(names["model"].state_dict()), history(run)) == (expected.weights, expected.history)
        problems = [] if same else [f"not equal, {run.state} at step {run.progress.step}"]
        problems += [f"left running: {left}" for left in [psutil.wait_procs(processes, GONE_WITHIN_S)[1]] if left]
        return Trial(problem="; ".join(problems), seconds=[seconds])
    finally:
        gate.open()
        for process in _marked(mark):
            process.kill()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def controller_killed(rng: random.Random) -> Iterator[Result]:
    """A clear error for the run, and the next start of the same cluster works; timed from the kill to that."""
    for _ in range(3):
        lab = Lab("shared memory")
        try:
            expected = lab.reference("shared weights", epochs=30)
            _, model, data, options = lab.make("shared weights", epochs=10**6)  # endless
            run = lab.cluster.train(model, data, background=True, **options)
            run.wait(rng.uniform(0.0, 1.0))
            old = [psutil.Process(pid) for pid in lab.pids()]
            lab.cluster._up._launch._cluster.controller.process.kill()
            killed_s = time.monotonic()
            problems = []
            try:
                run.wait(ENDED_WITHIN_S)
                problems.append(f"no error: {run.state}")
            except ClusterError as error:
                if "controller" not in str(error) or "%dist_start" not in str(error):
                    problems.append(f"error: {error}")
            lab.cluster.start()
            seconds = time.monotonic() - killed_s
            problems += [f"left running: {left}" for left in [psutil.wait_procs(old, GONE_WITHIN_S)[1]] if left]
            _, model, data, options = lab.make("shared weights", epochs=30)
            run = lab.cluster.train(model, data, **options)
            if (digest(model.state_dict()), history(run)) != (expected.weights, expected.history):
                problems.append("the next run has other numbers")
            yield (
                ("the controller is killed: until a new start", "shared memory"),
                Trial(problem="; ".join(problems), seconds=[seconds]),
            )
        finally:
            lab.close()


def disk_full(rng: random.Random) -> Iterator[Result]:
    """In a mount namespace of its own, where a small tmpfs can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={DISK_MIB}m tmpfs "$0" && exec "$@"', folder]
        done = subprocess.run([*own, *SESSION, "disk", folder], capture_output=True, text=True, timeout=600)
        lines = done.stdout.split("\n")
        wanted = {"equal", "noted", "whole"}
        yield (
            ("the disk gets full during a checkpoint", "shared memory"),
            Trial(problem="" if wanted <= {*lines} else f"{lines} {done.stderr[-1500:]}"),
        )


def beside_torchrun(rng: random.Random) -> Iterator[Result]:
    """One rank of a model with 30 MiB of weights and optimizer state, in the four phases of a step.

    Alternates with ``torchrun --max-restarts``, which restarts all ranks from the last checkpoint.
    """
    event, lab, counted = "`kill -9`, 30 MiB of state", Lab("shared memory"), itertools.count()
    traps, expected = _under_torchrun([])
    assert expected, "torchrun did not end well"
    try:
        for _ in range(5):
            chosen = [
                (PHASES[i % len(PHASES)], i % RANKS, step)
                for i, step in zip(counted, sorted(rng.sample(range(3, STEPS - 1), RESTARTS)), strict=False)
            ]
            for trap in chosen * 2:
                yield (event, "shared memory"), lab.survives("30 MiB", trap)
            traps, found = _under_torchrun(chosen)
            problem = "" if found == expected else f"not equal, {traps.left}"
            yield (f"{event}: torchrun", "shared memory"), Trial(problem=problem, seconds=traps.recovery_seconds())
    finally:
        lab.close()


def _under_torchrun(traps_set: list[tuple[str, int, int]]) -> tuple[Traps, list[str]]:
    """The workload of 30 MiB under torchrun; returns its ranks' log, and its final digests."""
    folder = tempfile.mkdtemp()
    traps = Traps(folder)
    for trap in traps_set:
        traps.set(*trap)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        f"--max-restarts={RESTARTS}", *SESSION[1:], "torchrun", folder,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.run(command, capture_output=True, timeout=600, env=environment)
    result = [Path(folder, name) for name in ("digest", "history")]
    return traps, [path.read_text() for path in result] if all(path.exists() for path in result) else []


def scaled(rng: random.Random) -> Iterator[Result]:
    """With `reproducible`, on 1 to 4 engines: they join and leave at random steps, and sometimes one is killed too.

    Timed from the command until a step on the new number is done. Compared with an undisturbed run on three.
    """
    lab, more = Lab("shared memory"), {"reproducible": True, "accumulate": 1, "epochs": SCALED_EPOCHS}
    try:
        for workload, also in itertools.product(WORKLOADS, ("", "", " and a rank is killed")):
            lab.cluster.scale(RANKS)
            lab.reference(workload, **more)
            steps, seconds = tuple(sorted(rng.sample(range(2, 8 * SCALED_EPOCHS, SCALED_APART), 3))), list[float]()
            scale = functools.partial(_scale, lab, rng, bool(also), steps, seconds)
            trial = lab.survives(workload, meanwhile=scale, held=steps, **more)
            yield (f"`%dist_scale` at random steps{also}", "shared memory"), dataclasses.replace(trial, seconds=seconds)
    finally:
        lab.close()


def _scale(
    lab: Lab, rng: random.Random, also_a_kill: bool, steps: tuple[int, ...], seconds: list[float], run: Any,
    traps: Traps,
) -> None:  # fmt: skip
    gate = Gate(traps.folder)
    for step, following in itertools.zip_longest(steps, steps[1:]):

        def answered(step=step, following=following):
            """Whether a step on the new number is done; one that is held soon after may not have been reported."""
            return run.ended or run.progress.step > step + ANSWERED or (following and gate.is_reached(following))

        gate.wait(step, ranks=lab.cluster.size, run=run)
        size = rng.choice([size for size in (1, 2, 3, 4) if size != lab.cluster.size])
        lab.cluster.scale(size)
        if also_a_kill:
            traps.kill(rng.choice(lab.pids()))
        scaled_s = time.monotonic()
        gate.open(step)
        until(lambda size=size: lab.cluster.size == size)
        until(answered)
        seconds.append(time.monotonic() - scaled_s)


SCENARIOS = {
    "scaled": scaled,
    "kernel": kernel_killed,
    "detached": kernel_replaced,
    "controller": controller_killed,
    "disk": disk_full,
    "torchrun": beside_torchrun,
}
