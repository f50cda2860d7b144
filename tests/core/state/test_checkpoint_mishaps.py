"""Mishaps while a checkpoint is being written: the one before it is intact, and the training continues."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from problems import SGD, alone, assert_same_bits, classes, mlp, train, weights
from saved_checkpoints import mounted, newest
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.state import folder_lease
from nbdist.core.state.checkpoint_reader import MANIFEST, NEWEST, CheckpointReader, checkpoints
from nbdist.core.state.checkpoint_writer import THREAD
from nbdist.core.state.folder_lease import Lease
from nbdist.errors import PlanError
from nbdist.telemetry import Noted
from nbdist.telemetry.host import host_name

KILLS = 15


class Counting(nn.Module):
    """Each step of SGD with a rate of 1 adds one to all of it."""

    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(200_000))
        self.register_buffer("seen", torch.zeros(50_000))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.count.sum() * x.mean() - self.count.sum()


def count(folder, steps, begun=lambda: None):
    """Train with a checkpoint as often as possible."""

    def step(model, x):
        begun()
        return model(x)

    return alone(
        Counting(), torch.zeros(64, 1), step=step, optimizer="sgd", lr=1.0, batch_size=8,
        steps=steps, checkpoint=folder, checkpoint_every=1, resume=True,
    )  # fmt: skip


def count_forever(folder, ready):
    torch.set_num_threads(1)
    steps = itertools.count()
    count(folder, 10**6, lambda: next(steps) or ready.send_bytes(b"here"))


def test_whenever_it_is_killed_the_newest_checkpoint_is_whole(run_ranks, tmp_path):
    """kill -9 of a real training at any moment: the newest checkpoint loads, and has the weights of its step."""
    context, moments, last = multiprocessing.get_context("forkserver"), random.Random(0), 0
    kills, within_s = 0, 0.15
    while kills < KILLS or last <= 1:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=count_forever, args=(str(tmp_path), there))
        process.start()
        here.recv_bytes()
        process.join(moments.random() * within_s)
        process.kill()
        kills += 1
        process.join()
        process.close()
        here.close()
        there.close()
        step = step_of(tmp_path) if checkpoints(tmp_path) else 0
        assert step >= last
        within_s *= 1 if step > last else 1.2  # a slow machine gets further when it is left alone for longer
        last = step
    count(str(tmp_path), last + 1)
    assert last + 1 == step_of(tmp_path)
    assert {NEWEST, *checkpoints(tmp_path)} == {path.name for path in tmp_path.iterdir() if path.name[0] != "."}


def step_of(folder):
    """The step of the newest checkpoint; checks every value, and that it loads without a warning."""
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    nbdist.load_checkpoint(str(folder), model, optimizer)
    step = CheckpointReader.in_folder(str(folder)).ranks[0]["position"]["step"]
    assert (model.count == step).all()
    assert (model.seen == step).all()
    assert 1.0 == optimizer.param_groups[0]["lr"]
    return step


def notes_of(folder, mishap, loss=F.cross_entropy, **options):
    """Train three epochs of five steps, with `mishap(step)` before each step; the result and the notes."""
    notes, steps = [], iter(range(1, 99))

    class Sink:
        def emit(self, event):
            if isinstance(event, Noted):
                notes.append(event.text)

    def noticed(output, target):
        for thread in threading.enumerate():
            if thread.name == THREAD:
                thread.join()
        mishap(next(steps))
        return loss(output, target)

    result, after = alone(
        mlp(), classes(40), optimizer=SGD, batch_size=8, epochs=3, loss=noticed, checkpoint=str(folder),
        checkpoint_every=2, sinks=[Sink()], **options,
    )  # fmt: skip
    return result, after, notes


def test_a_folder_that_is_removed_in_mid_run(tmp_path):
    """The run finishes with the same bits, with a note for each checkpoint that could not be written."""
    folder = tmp_path / "folder"
    result, after, notes = notes_of(folder, lambda step: step == 6 and shutil.rmtree(folder))
    assert "finished" == result.state
    assert_same_bits(alone(mlp(), classes(40), optimizer=SGD, batch_size=8, epochs=3)[1], after)
    assert len(notes) >= 3
    assert all("could not be written (No such file or directory): the run continues" in note for note in notes)
    assert "the checkpoint of step 15 " in notes[-1]
    assert not folder.exists()


def test_a_folder_that_exists_again(tmp_path):
    """Checkpoints are written again."""
    folder = tmp_path / "folder"

    def mishap(step):
        if step == 4:
            folder.rename(tmp_path / "away")
        elif step == 8:
            (tmp_path / "away").rename(folder)

    result, after, notes = notes_of(folder, mishap)
    assert ("finished", True) == (result.state, 1 <= len(notes) <= 2)
    again = mlp()
    nbdist.load_checkpoint(str(folder), again)
    assert_same_bits(after, weights(again))
    assert {NEWEST, *checkpoints(folder)} == {path.name for path in folder.iterdir()}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_no_space_for_the_manifest(tmp_path):
    """A checkpoint that cannot be published is removed, and the one before it stays the newest."""

    def mishap(step):
        if step == 6:
            (tmp_path / f".{NEWEST}").symlink_to("/dev/full")

    result, _, notes = notes_of(tmp_path, mishap)
    assert "finished" == result.state
    assert "the checkpoint of step 15 could not be written (No space left on device)" in notes[-1]
    assert 4 == CheckpointReader.in_folder(str(tmp_path)).ranks[0]["position"]["step"]
    assert {NEWEST, f".{NEWEST}", *checkpoints(tmp_path)} == {path.name for path in tmp_path.iterdir()}


def on_a_full_disk(_world, folder):
    """A disk of 200 KiB that is filled up in step 6: the notes."""
    if not mounted(folder, b"size=200k"):
        return None

    def mishap(step):
        if step == 6:
            with open(f"{folder}/full", "wb", buffering=0) as file:
                while True:
                    try:
                        file.write(b"0" * 4096)
                    except OSError:
                        return
        elif step == 10:
            os.unlink(f"{folder}/full")

    result, after, notes = notes_of(folder, mishap)
    again = mlp()
    nbdist.load_checkpoint(folder, again)
    assert_same_bits(after, weights(again))
    assert {NEWEST, *checkpoints(Path(folder))} == {path.name for path in Path(folder).iterdir()}
    return result.state, notes


def test_a_disk_that_is_full_for_a_while(run_ranks, tmp_path):
    """The run continues with a note, and writes again when there is space."""
    outcome = run_ranks(1, on_a_full_disk, str(tmp_path))[0]
    if outcome is None:
        pytest.skip("no disk can be made here")
    state, notes = outcome
    assert "finished" == state
    assert notes
    assert all("could not be written (No space left on device): the run continues, ear" in note for note in notes)


def hidden_from_one(world, folder):
    """Rank 1 sees another disk under the same name."""
    refused = world.rank == 1 and not mounted(folder, None)
    try:
        train(world, mlp(), classes(16), optimizer="sgd", batch_size=8, checkpoint=folder)
    except PlanError as error:
        return str(error), refused
    return "", refused


def test_a_folder_that_not_all_ranks_see(run_ranks, tmp_path):
    """It is refused before the first step, on all ranks, and nothing of the check stays in it."""
    (refusal, _), (other, no_disk) = run_ranks(2, hidden_from_one, str(tmp_path))
    if no_disk:
        pytest.skip("no disk can be made here")
    assert refusal == other
    assert f"host {host_name()} does not see what rank 0 writes there" in refusal
    assert [] == [path.name for path in tmp_path.iterdir() if "shared" in path.name]
    assert [] == checkpoints(tmp_path)


def test_a_writer_thread_that_fails_for_any_reason(tmp_path, monkeypatch):
    """An error other than the disk's is reported too, and the checkpoint is not published."""

    def broken(*_args):
        raise MemoryError("no room")

    def mishap(step):
        if step == 5:
            monkeypatch.setattr("nbdist.core.state.checkpoint_writer.write_file", broken)

    result, _, notes = notes_of(tmp_path, mishap)
    assert "finished" == result.state
    assert "could not be written (MemoryError: no room)" in notes[-1]
    assert 4 == CheckpointReader.in_folder(str(tmp_path)).ranks[0]["position"]["step"]
    assert (newest(tmp_path) / MANIFEST).exists()


def test_another_run_that_has_taken_the_folder_meanwhile(tmp_path, monkeypatch):
    """A run without a heartbeat publishes nothing there any more."""
    monkeypatch.setattr(folder_lease, "_BEAT_S", 1e9)
    monkeypatch.setattr(folder_lease, "LEASE_S", 0.05)
    taken = []

    def mishap(step):
        if step == 6:
            taken.append((Lease(str(tmp_path), "awake").acquire(), (tmp_path / NEWEST).read_text()))

    result, _, notes = notes_of(tmp_path, mishap)
    ((lease, published),) = taken
    lease.release()
    assert ("finished", published) == (result.state, (tmp_path / NEWEST).read_text())
    assert "the checkpoint of step 15 could not be written (run awake (process " in notes[-1]
    assert " writes into the folder now): the run continues" in notes[-1]
