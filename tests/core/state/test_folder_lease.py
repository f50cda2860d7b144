"""The lease: one run at a time writes into a checkpoint folder, from any host; a dead run locks no other out."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from problems import Given, alone, classes, mlp
from saved_checkpoints import newest
from torch.nn import functional as F

from nbdist.core.state import folder_lease
from nbdist.core.state.checkpoint_reader import NEWEST, CheckpointReader, checkpoints
from nbdist.core.state.checkpoint_writer import THREAD
from nbdist.core.state.folder_lease import Lease
from nbdist.errors import PlanError
from nbdist.telemetry import Noted

OTHER = "another-host"
REFUSED = r"^checkpoint='.*' is being written by run theirs \(process \d+ on .*\): wait until that run has ended, or"


def gated(gate, here):
    """A loss that reports the fourth step, and waits there until a file `gate` exists."""
    steps = iter(range(1, 999))

    def loss(output, target):
        for thread in threading.enumerate():
            if thread.name == THREAD:
                thread.join()
        if next(steps) == 4:  # the checkpoint of step 1 is published, that of step 3 is written but not published yet
            here.send_bytes(b"here")
            while not os.path.exists(gate):
                time.sleep(0.002)
        return F.cross_entropy(output, target)

    return loss


def write(folder, gate, here, host):
    """A run that writes into a folder from a host, and waits at a gate."""
    torch.set_num_threads(1)
    os.environ["NBDIST_HOST"] = host
    alone(
        mlp(), classes(40), optimizer="sgd", batch_size=8, steps=8, loss=gated(gate, here), checkpoint=folder,
        checkpoint_every=1, run_id="theirs",
    )  # fmt: skip


@pytest.fixture
def writer(tmp_path, monkeypatch, run_ranks):
    """``writer(host)``: a process in mid-run that writes into ``tmp_path / "run"``, and the gate it waits at."""
    monkeypatch.setattr(folder_lease, "_GRACE_S", 0.0)
    context = multiprocessing.get_context("forkserver")
    started = []

    def start(host):
        here, there = context.Pipe(duplex=False)
        gate = tmp_path / "gate"
        process = context.Process(target=write, args=(str(tmp_path / "run"), str(gate), there, host))
        process.start()
        started.append((process, here, there))
        assert here.recv_bytes()
        return process, gate

    yield start
    for process, here, there in started:
        process.kill()
        process.join()
        process.close()
        here.close()
        there.close()


def mine(folder, **options):
    return alone(mlp(), classes(40), optimizer="sgd", batch_size=8, checkpoint=str(folder), **options)


@pytest.mark.parametrize("host", ["", OTHER], ids=["same host", "another host"])
def test_a_second_run_is_refused(writer, tmp_path, host):
    """Before it changes anything: the first run's checkpoint is published, and nothing else."""
    process, gate = writer(host)
    half = {path.name for path in (tmp_path / "run").glob("*-step*")}
    assert len(half) > len(checkpoints(tmp_path / "run")) > 0
    steps = []
    with pytest.raises(PlanError, match=REFUSED):
        mine(tmp_path / "run", steps=3, loss=lambda output, y: steps.append(1) or F.cross_entropy(output, y))
    assert not steps
    assert half == {path.name for path in (tmp_path / "run").glob("*-step*")}
    gate.touch()
    process.join()
    assert 0 == process.exitcode
    names = checkpoints(tmp_path / "run")
    assert {name.partition("-")[0] for name in half} == {name.partition("-")[0] for name in names}
    assert {NEWEST, *names} == {path.name for path in (tmp_path / "run").iterdir()}
    mine(tmp_path / "run", steps=9, resume=True)
    assert 9 == CheckpointReader.in_folder(str(tmp_path / "run")).ranks[0]["position"]["step"]


def test_a_run_that_was_killed_on_this_host_is_succeeded_at_once(writer, tmp_path, monkeypatch):
    """Without waiting for its heartbeat, since its process is gone."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 1e9)
    process, _ = writer("")
    process.kill()
    process.join()
    mine(tmp_path / "run", steps=9, resume=True)
    assert re.search(r"step0*9", newest(tmp_path / "run").name)
    assert {NEWEST, *checkpoints(tmp_path / "run")} == {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_that_was_killed_on_another_host_is_succeeded_without_a_heartbeat(writer, tmp_path, monkeypatch):
    """Its process cannot be seen from here; a local process may have the same id."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 0.2)
    process, _ = writer(OTHER)
    process.kill()
    process.join()
    mine(tmp_path / "run", steps=9, resume=True)
    assert re.search(r"step0*9", newest(tmp_path / "run").name)
    assert {NEWEST, *checkpoints(tmp_path / "run")} == {path.name for path in (tmp_path / "run").iterdir()}


def test_the_process_of_another_host_is_not_looked_for_on_this_one(tmp_path, monkeypatch):
    """Its heartbeat alone says that it lives."""
    monkeypatch.setattr(folder_lease, "_GRACE_S", 0.0)
    monkeypatch.setattr(folder_lease, "LEASE_S", 1e9)
    about = {"run": "theirs", "host": OTHER, "host_id": OTHER, "pid": 2**30, "born": 1, "state": "held"}
    path, ended = tmp_path / f"{folder_lease._PREFIX}0", threading.Event()
    path.write_text(f"{0:012d} {json.dumps(about)}")

    def beat():
        with path.open("r+b", buffering=0) as file:
            while not ended.wait(0.002):
                file.seek(0)
                file.write(f"{time.monotonic_ns() % 10**12:012d}".encode())

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(PlanError, match=REFUSED):
            Lease(str(tmp_path), "run").acquire()
    finally:
        ended.set()
        beating.join()
    assert [path] == list(tmp_path.iterdir())


def test_of_many_that_come_at_once_one_has_it_at_a_time(tmp_path, monkeypatch):
    """One after the other, never two."""
    monkeypatch.setattr(folder_lease, "_GRACE_S", 1e9)
    inside, entered, failed = tmp_path / "inside", [], []
    begin = threading.Barrier(8)

    def compete(number):
        try:
            begin.wait()
            mine = Lease(str(tmp_path), f"run {number}").acquire()
            inside.touch(exist_ok=False)
            mine.confirm()
            entered.append(number)
            inside.unlink()
            mine.release()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == failed
    assert [*range(8)] == sorted(entered)
    assert [] == list(tmp_path.iterdir())


def test_a_run_that_has_slept_through_its_lease_writes_no_more(tmp_path, monkeypatch):
    """Until no other run holds it."""
    asleep = Lease(str(tmp_path), "asleep")
    monkeypatch.setattr(asleep, "_beat", lambda: None)
    asleep._thread = threading.Thread(target=lambda: None)
    monkeypatch.setattr(folder_lease, "LEASE_S", 0.05)
    asleep.acquire()
    awake = Lease(str(tmp_path), "awake").acquire()
    with pytest.raises(BlockingIOError, match=r"run awake \(process \d+ on .*\) writes into the folder now"):
        asleep.confirm()
    awake.confirm()
    awake.release()
    asleep.confirm()
    asleep.release()
    assert [] == list(tmp_path.iterdir())


def test_a_run_succeeds_itself_at_once(tmp_path, monkeypatch):
    """With another process as rank 0, since the former one is dead or has left the world."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 1e9)
    before = Lease(str(tmp_path), "run").acquire()
    after = Lease(str(tmp_path), "run").acquire()
    after.confirm()
    before.release()
    after.confirm()
    after.release()


@pytest.mark.parametrize("text", ["", "0", "0 {", "0 []", '0 {"run": 3}', '0 {"host_id": []}'])
def test_a_file_without_content_expires(tmp_path, monkeypatch, text):
    """Such as that of a run that died while it wrote it."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 0.05)
    (tmp_path / f"{folder_lease._PREFIX}0").write_text(text)
    Lease(str(tmp_path), "run").acquire().release()
    assert [] == list(Path(tmp_path).iterdir())


def test_a_checkpoint_command_does_not_write_into_the_folder_of_another_run(writer, tmp_path):
    """The run continues with a note; into a folder without a lease it is written, twice too."""
    writer(OTHER)
    theirs, own = str(tmp_path / "run"), tmp_path / "own"
    before, notes = checkpoints(tmp_path / "run"), []
    sink = type("Sink", (), {"emit": lambda _, event: isinstance(event, Noted) and notes.append(event.text)})()
    commands = Given({1: [("checkpoint", theirs)], 2: [("checkpoint", str(own))], 3: [("checkpoint", str(own))]})
    result, _ = alone(mlp(), classes(40), optimizer="sgd", batch_size=8, epochs=1, commands=commands, sinks=[sink])
    assert ("finished", 1) == (result.state, len(notes))
    assert (
        f"no checkpoint was written, the run continues: checkpoint={theirs!r} is being written by run theirs"
        in notes[0]
    )
    assert before == checkpoints(tmp_path / "run")
    assert 2 == len(checkpoints(own))
    assert {NEWEST, *checkpoints(own)} == {path.name for path in own.iterdir()}
