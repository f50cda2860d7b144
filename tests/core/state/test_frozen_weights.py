"""Frozen weights: written once for all checkpoints; saved like trainable ones if a step changes them."""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from problems import FEATURES, SGD, alone, assert_same_bits, classes, seeded, stop_after, train, weights
from saved_checkpoints import newest
from torch import nn
from torch.nn import functional as F

import nbdist
from nbdist.core.state.checkpoint_reader import checkpoints
from nbdist.core.state.checkpoint_writer import THREAD
from nbdist.core.state.snapshot import SnapshotStore

FILE = "rank0-frozen.safetensors"


class Adapted(nn.Module):
    """A frozen base of 4 MB, and a small trainable layer."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(FEATURES, 160_000).requires_grad_(False)
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x):
        return self.head(x) + self.base.bias[:3]


def waiting(output, target):
    """A loss that waits for the writing thread, so that no checkpoint has to wait for the one before."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()
    return F.cross_entropy(output, target)


def adapt(folder, model=None, **options):
    """Five checkpoints of a model with frozen weights."""
    options = {"loss": waiting, "checkpoint_keep": 9, **options}
    return alone(
        model or seeded(Adapted), classes(40, torch.float32), optimizer=SGD, batch_size=8, epochs=2,
        checkpoint=str(folder), checkpoint_every=2, **options,
    )  # fmt: skip


def bytes_written():
    return int(re.search(r"wchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count what is written")
def test_frozen_weights_are_written_once(tmp_path):
    """Of five checkpoints of 4 MB, nearly all bytes are written for the first one; each one is complete."""
    before = bytes_written()
    _, after = adapt(tmp_path)
    places = [tmp_path / name for name in checkpoints(tmp_path)]
    base = seeded(Adapted).base
    assert 5 == len(places)
    assert bytes_written() - before < 1.5 * (base.weight.nbytes + base.bias.nbytes)
    for place in places:
        model = seeded(Adapted)
        nn.init.zeros_(model.base.weight)
        nbdist.load_checkpoint(str(place), model)
        assert torch.equal(seeded(Adapted).base.weight, model.base.weight)
    assert_same_bits(after, weights(model))


def test_a_checkpoint_is_complete_without_those_before_it(tmp_path):
    """After `checkpoint_keep` has removed those, and after a copy to another place."""
    _, after = adapt(tmp_path / "run", checkpoint_keep=1)
    assert [newest(tmp_path / "run").name] == [path.name for path in (tmp_path / "run").glob("*-step*")]
    shutil.copytree(newest(tmp_path / "run"), tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    model = seeded(Adapted)
    nbdist.load_checkpoint(str(tmp_path / "copy"), model)
    assert_same_bits(after, weights(model))


def test_without_hard_links_they_are_written_again(tmp_path, monkeypatch):
    """Some file systems have no hard links."""

    def refused(*_args, **_kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    _, after = adapt(tmp_path)
    assert 5 == len({(tmp_path / name / FILE).stat().st_ino for name in checkpoints(tmp_path)})
    model = seeded(Adapted)
    nbdist.load_checkpoint(str(tmp_path), model)
    assert_same_bits(after, weights(model))


def test_a_file_that_was_removed_is_written_again(tmp_path):
    """By another process, during the run."""
    steps = iter(range(99))

    def tidied(output, target):
        loss = waiting(output, target)
        if next(steps) == 5:
            (newest(tmp_path) / FILE).unlink()
        return loss

    _, after = adapt(tmp_path, loss=tidied)
    model = seeded(Adapted)
    nbdist.load_checkpoint(str(tmp_path), model)
    assert_same_bits(after, weights(model))


class Followed(nn.Module):
    """A teacher that is not trained, but follows the weights in every step; too large to be saved as a small buffer."""

    def __init__(self, unseen=False):
        super().__init__()
        self.student = nn.Linear(FEATURES, 4000)
        self.teacher = nn.Linear(FEATURES, 4000).requires_grad_(False)
        self.unseen = unseen

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                rows = slice(1, 2) if self.unseen == "a row" else slice(None)
                weight = self.teacher.weight.data if self.unseen else self.teacher.weight
                weight[rows].mul_(0.5).add_(self.student.weight[rows], alpha=0.5)
        return self.student(x)[:, :3] - self.teacher(x)[:, :3]


def stopped_and_gone_on(world, paths):
    options = {"optimizer": SGD, "batch_size": 16, "epochs": 2}
    expected = train(world, seeded(Followed), classes(80, torch.float32), **options)
    train(world, seeded(Followed), classes(80, torch.float32), snapshot_paths=paths, commands=stop_after(3), **options)
    actual = train(
        world, seeded(Followed), classes(80, torch.float32), snapshot_paths=paths, from_snapshot=True, **options
    )
    return expected[1], actual[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_teacher_is_in_the_snapshot(run_ranks, ranks):
    """A run resumed from memory has the teacher of the snapshot's step, not the initial one."""
    snapshot_store = SnapshotStore(ranks)
    for expected, actual in run_ranks(ranks, stopped_and_gone_on, snapshot_store.paths):
        assert_same_bits(expected, actual)
    snapshot_store.close()


@pytest.mark.parametrize("unseen", [False, True, "a row"])
def test_a_teacher_is_in_each_checkpoint_as_it_was(tmp_path, unseen):
    """Even if it is written through ``.data``, which torch does not count."""
    seen = {}
    model = seeded(lambda: Followed(unseen))

    def noted(output, target):
        loss = waiting(output, target)
        seen[len(seen)] = model.teacher.weight.clone()
        return loss

    adapt(tmp_path, model, loss=noted)
    for name in checkpoints(tmp_path):
        again = Followed()
        nbdist.load_checkpoint(str(tmp_path / name), again)
        step = int(re.search(r"step0*(\d+)", name)[1])
        assert torch.equal(seen[step - 1], again.teacher.weight), name


def test_an_error_in_a_step_that_has_moved_a_teacher(run_ranks):
    """The state after the last complete step is lost, so the snapshot before it is loaded."""
    snapshot_store = SnapshotStore(1)
    reported = run_ranks(1, torn, snapshot_store.paths)[0]
    assert reported
    snapshot_store.close()


def torn(world, paths):
    """Whether the saved state is one that existed after some step."""
    model, seen = seeded(Followed), {}

    def noted(output, target):
        seen[len(seen)] = model.teacher.weight.clone()
        if len(seen) == 4:
            raise ValueError("torn")
        return F.cross_entropy(output, target)

    from nbdist.core.state.checkpoint_reader import CheckpointReader
    from nbdist.core.state.restore import load_whole

    with pytest.raises(ValueError, match="torn"):
        train(world, model, classes(80, torch.float32), optimizer=SGD, loss=noted, batch_size=16, snapshot_paths=paths)
    saved, again = CheckpointReader.of_snapshot(paths), seeded(Followed)
    load_whole(saved, again)
    return torch.equal(seen[saved.step - 1], again.teacher.weight)
