"""One run at a time writes into a folder of checkpoints, on whatever hosts they are; who dies locks nobody out."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from kept import newest
from problems import Given, alone, classes, mlp
from torch.nn import functional as F

from nbdist.core.state import folder_lease
from nbdist.core.state.checkpoint_reader import NEWEST, CheckpointReader, checkpoints
from nbdist.core.state.checkpoint_writer import THREAD
from nbdist.core.state.folder_lease import Lease
from nbdist.errors import PlanError
from nbdist.telemetry import Noted

OTHER = "another-host"
REFUSED = r"^checkpoint='.*' is being written by run theirs \(process \d+ on .*\): wait until that has ended, or"


def gated(gate, here):
    """A loss that tells when the fourth step has come, and goes no further before there is a file `gate`."""
    steps = iter(range(1, 999))

    def loss(output, target):
        for thread in threading.enumerate():
            if thread.name == THREAD:
                thread.join()
        if next(steps) == 4:  # the checkpoint of step 1 counts, that of step 3 has been written and does not yet
            here.send_bytes(b"here")
            while not os.path.exists(gate):
                time.sleep(0.002)
        return F.cross_entropy(output, target)

    return loss


def write(folder, gate, here, host):
    """A run that writes into a folder from a host, until it is let go on."""
    torch.set_num_threads(1)
    os.environ["NBDIST_HOST"] = host
    alone(
        mlp(), classes(40), optimizer="sgd", batch_size=8, steps=8, loss=gated(gate, here), checkpoint=folder,
        checkpoint_every=1, run_id="theirs",
    )  # fmt: skip


@pytest.fixture
def writer(tmp_path, monkeypatch, run_ranks):
    """``writer(host)``: a process in mid-run that writes into ``tmp_path / "run"``, and the gate it waits at."""
    monkeypatch.setattr(folder_lease, "_PATIENCE_S", 0.0)
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
    """Before it touches anything: what the first one is writing comes to count, and nothing else does."""
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


def test_a_run_that_was_killed_on_this_host_is_followed_at_once(writer, tmp_path, monkeypatch):
    """Nobody waits for its silence, for its process is gone."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 1e9)
    process, _ = writer("")
    process.kill()
    process.join()
    mine(tmp_path / "run", steps=9, resume=True)
    assert re.search(r"step0*9", newest(tmp_path / "run").name)
    assert {NEWEST, *checkpoints(tmp_path / "run")} == {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_that_was_killed_on_another_host_is_followed_when_it_has_been_silent(writer, tmp_path, monkeypatch):
    """There nobody here can know of its process; its number, which may be another's here, says nothing."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 0.2)
    process, _ = writer(OTHER)
    process.kill()
    process.join()
    mine(tmp_path / "run", steps=9, resume=True)
    assert re.search(r"step0*9", newest(tmp_path / "run").name)
    assert {NEWEST, *checkpoints(tmp_path / "run")} == {path.name for path in (tmp_path / "run").iterdir()}


def test_of_many_that_come_at_once_one_has_it_at_a_time(tmp_path, monkeypatch):
    """Each in its turn, and never two."""
    monkeypatch.setattr(folder_lease, "_PATIENCE_S", 1e9)
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
    """Until nobody has it any more."""
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
    """When its rank 0 is another process: that one is gone, or has left the world."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 1e9)
    before = Lease(str(tmp_path), "run").acquire()
    after = Lease(str(tmp_path), "run").acquire()
    after.confirm()
    before.release()
    after.confirm()
    after.release()


@pytest.mark.parametrize("text", ["", "0", "0 {", "0 []", '0 {"run": 3}', '0 {"host_id": []}'])
def test_a_file_that_says_nothing_is_outwaited(tmp_path, monkeypatch, text):
    """As of a run that died while it wrote it."""
    monkeypatch.setattr(folder_lease, "LEASE_S", 0.05)
    (tmp_path / f"{folder_lease._PREFIX}0").write_text(text)
    Lease(str(tmp_path), "run").acquire().release()
    assert [] == list(Path(tmp_path).iterdir())


def test_a_checkpoint_that_a_person_asks_for_goes_into_no_folder_of_another_run(writer, tmp_path):
    """The run goes on and says so; into a folder of its own it is written, twice too."""
    writer(OTHER)
    theirs, own = str(tmp_path / "run"), tmp_path / "own"
    before, notes = checkpoints(tmp_path / "run"), []
    sink = type("Sink", (), {"emit": lambda _, event: isinstance(event, Noted) and notes.append(event.text)})()
    commands = Given({1: [("checkpoint", theirs)], 2: [("checkpoint", str(own))], 3: [("checkpoint", str(own))]})
    result, _ = alone(mlp(), classes(40), optimizer="sgd", batch_size=8, epochs=1, commands=commands, sinks=[sink])
    assert ("finished", 1) == (result.state, len(notes))
    assert (
        f"no checkpoint was written, the run goes on: checkpoint={theirs!r} is being written by run theirs" in notes[0]
    )
    assert before == checkpoints(tmp_path / "run")
    assert 2 == len(checkpoints(own))
    assert {NEWEST, *checkpoints(own)} == {path.name for path in own.iterdir()}
