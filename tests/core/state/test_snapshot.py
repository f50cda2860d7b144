"""Snapshots: whichever rank is killed, and whenever, the newest one that all ranks completed is intact."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import threading

import pytest
import torch
from gate import NotedLock
from open_files import memory_files
from other_user import in_fork

from nbdist.core.state.snapshot import BUFFERS_PER_RANK, RankSnapshots, SnapshotBuffer, SnapshotStore, newest, read
from nbdist.core.state.tensor_buffer import TensorLayout

KILLS = 25


@pytest.fixture
def snapshot_store():
    """Memory for two ranks."""
    made = SnapshotStore(2)
    yield made
    made.close()


def filled(step, numel=64):
    return {"a": torch.full((numel,), float(step)), "b": torch.full((3,), step)}


def write(rank_snapshots, step, ranks=2, ended=0, numel=64):
    """A snapshot whose every number is the step."""
    tensors = filled(step, numel)
    return rank_snapshots.write((step, ended), ranks, TensorLayout(tensors), tensors, f"{step}/{ended}")


def held(snapshot_store):
    """The newest snapshot, with every value checked: its step, and each rank's text."""
    found = newest(snapshot_store.paths)
    if found is None:
        return None
    step, buffers = found
    for saved in read(buffers):
        for key in saved.keys:
            assert (saved.read(key) == step).all()
        assert saved.text.startswith(f"{step}/")
    return step, [saved.text for saved in read(buffers)]


def test_the_newest_is_the_one_that_all_ranks_have(snapshot_store):
    """A snapshot of one rank does not count until the other has it too."""
    first, second = map(RankSnapshots, snapshot_store.paths)
    assert held(snapshot_store) is None
    assert -1 == snapshot_store.last_step
    write(first, 1)
    assert held(snapshot_store) is None
    assert 1 == snapshot_store.last_step
    write(second, 1)
    assert (1, ["1/0", "1/0"]) == held(snapshot_store)
    write(first, 2)
    assert 1 == held(snapshot_store)[0]
    write(second, 2)
    assert 2 == held(snapshot_store)[0]
    assert 2 == snapshot_store.last_step


def test_in_any_order_a_step_apart():
    """Whatever the sequence of writes, if no rank is more than a step ahead, the newest common snapshot is found."""
    for order in itertools.product([0, 1], repeat=8):
        snapshot_store = SnapshotStore(2)
        own, steps = [RankSnapshots(paths) for paths in snapshot_store.paths], [0, 0]
        for rank in order:
            if steps[rank] <= steps[1 - rank]:
                steps[rank] += 1
                write(own[rank], steps[rank])
                assert (min(steps) or None) == (held(snapshot_store) or [None])[0]
        snapshot_store.close()


def test_the_end_of_an_epoch_is_another_moment(snapshot_store):
    """It has the step of the snapshot before it: ranks must not mix the two."""
    first, second = map(RankSnapshots, snapshot_store.paths)
    write(first, 5)
    write(second, 5)
    write(first, 5, ended=1)
    assert (5, ["5/0", "5/0"]) == held(snapshot_store)
    write(second, 5, ended=1)
    assert (5, ["5/1", "5/1"]) == held(snapshot_store)


def test_the_same_moment_again_leaves_the_one_before(snapshot_store):
    """After an error a rank may save its last snapshot again, while another rank has not saved that moment yet."""
    first, second = map(RankSnapshots, snapshot_store.paths)
    for step in (1, 2):
        write(first, step)
        write(second, step)
    write(first, 3)
    write(first, 3)
    assert (2, ["2/0", "2/0"]) == held(snapshot_store)
    write(second, 3)
    assert 3 == held(snapshot_store)[0]


def test_two_buffers_alternately_and_a_third_while_one_is_pinned(snapshot_store):
    """The third takes memory only once a checkpoint is being written."""
    rank_snapshots, other = map(RankSnapshots, snapshot_store.paths)
    buffers = [write(rank_snapshots, step) for step in range(1, 5)]
    assert [buffers[0], buffers[1]] * 2 == buffers
    assert [buffer.path for buffer in buffers[:2]] == snapshot_store.paths[0][:2]
    buffers[3].pinned = True
    assert 3 == len({buffers[3], *(write(rank_snapshots, step) for step in range(5, 9))})
    saved = read({0: buffers[3]})[0]
    assert "4/0" == saved.text
    buffers[3].pinned = False
    after = [write(rank_snapshots, step) for step in range(9, 13)]
    assert 2 == len(set(after))
    write(other, 12)
    assert 12 == held(snapshot_store)[0]


def test_trim_frees_all_but_the_newest(snapshot_store):
    """And the store can be written again."""
    own = [RankSnapshots(paths) for paths in snapshot_store.paths]
    for step in (1, 2, 3):
        for rank_snapshots in own:
            write(rank_snapshots, step, numel=10_000)
    snapshot_store.trim()
    assert 3 == held(snapshot_store)[0]
    sizes = [os.stat(path.rpartition(":")[0]).st_size > 0 for paths in snapshot_store.paths for path in paths]
    assert [True, False, False] * 2 == sizes
    again = [RankSnapshots(paths) for paths in snapshot_store.paths]
    for rank_snapshots in again:
        write(rank_snapshots, 4, numel=20_000)
    assert 4 == held(snapshot_store)[0]


def test_a_world_of_another_size(snapshot_store):
    """The store grows with the world; a snapshot of fewer ranks needs only theirs; older ones of another size lose."""
    for rank_snapshots in map(RankSnapshots, snapshot_store.paths):
        write(rank_snapshots, 1)
    write(RankSnapshots(snapshot_store.paths[0]), 2, ranks=1)
    assert (2, ["2/0"]) == held(snapshot_store)
    snapshot_store.grow(3)
    assert 3 == len(snapshot_store.paths)
    for rank_snapshots in map(RankSnapshots, snapshot_store.paths):
        write(rank_snapshots, 3, ranks=3)
    assert (3, ["3/0"] * 3) == held(snapshot_store)
    assert newest(snapshot_store.paths[:2]) is None or newest(snapshot_store.paths[:2])[0] < 3


def test_a_larger_state_enlarges_the_buffer(snapshot_store):
    """A process that has mapped the smaller buffer sees the new state too."""
    own = [RankSnapshots(paths) for paths in snapshot_store.paths]
    for step, numel in enumerate([1, 5000, 100_000, 7], start=1):
        for rank_snapshots in own:
            write(rank_snapshots, step, numel=numel)
        assert step == held(snapshot_store)[0]
        assert numel == read(newest(snapshot_store.paths)[1])[0].read("a").numel()


def write_forever(paths, ready):
    rank_snapshots, tensors = RankSnapshots(paths), filled(0, 300_000)
    layout, first = TensorLayout(tensors), max(0, *(SnapshotBuffer(path).head.step for path in paths)) + 1
    for step in itertools.count(first):
        for tensor in tensors.values():
            tensor.fill_(step)
        rank_snapshots.write((step, 0), 1, layout, tensors, f"{step}/0")
        if step == first:
            ready.send_bytes(b"here")


@pytest.mark.programs
def test_a_killed_writer_leaves_the_snapshot_before(run_ranks):
    """kill -9 at any moment of writing 1.2 MB: one is always complete, and never older than the last one."""
    snapshot_store, context = SnapshotStore(1), multiprocessing.get_context("forkserver")
    moments, last = random.Random(0), 0
    for _ in range(KILLS):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=write_forever, args=(snapshot_store.paths[0], there))
        process.start()
        here.recv_bytes()
        process.join(moments.random() * 0.02)
        process.kill()
        process.join()
        here.close()
        there.close()
        found = held(snapshot_store)
        if found is not None:
            assert found[0] >= last
            last = found[0]
        process.close()
    assert last >= KILLS
    snapshot_store.close()


def last_step_while_trimmed():
    """The last step, from a reader that another thread overtakes between the mapping of a segment and the reading."""
    snapshot_store, map_ = SnapshotStore(1), SnapshotBuffer._map
    RankSnapshots(snapshot_store.paths[0]).record_step(7)
    snapshot_store._trimming = lock = NotedLock(threading.Lock())
    trimming = threading.Thread(target=snapshot_store.trim)

    def overtaken(self, nbytes):
        found = map_(self, nbytes)
        if trimming.ident is None:
            trimming.start()
            while trimming.is_alive() and not lock.waited_for.is_set():
                trimming.join(0.001)
        return found

    SnapshotBuffer._map = overtaken
    step = snapshot_store.last_step
    trimming.join()
    return step


def test_no_memory_is_freed_while_it_is_read():
    """Which would be a bus error."""
    assert 7 == in_fork(last_step_while_trimmed)


def test_hundreds_leave_nothing_behind(snapshot_store):
    """Neither writer nor reader leaves files open or memory mapped."""

    def some():
        own = [RankSnapshots(paths) for paths in snapshot_store.paths]
        for step in range(1, 30):
            for rank_snapshots in own:
                write(rank_snapshots, step, numel=100_000)
            held(snapshot_store)

    some()
    gc.collect()
    files, mapped = memory_files(), maps()
    for _ in range(10):
        some()
    gc.collect()
    assert files == memory_files()
    assert mapped == maps()


def maps():
    """The number of segments that this process has mapped."""
    with open("/proc/self/maps") as lines:
        return sum("memfd:nbdist" in line for line in lines)


def test_closed_memory_is_gone():
    """Twice is fine."""
    made = SnapshotStore(2)
    paths = [path for own in made.paths for path in own]
    assert 2 * BUFFERS_PER_RANK == len(paths)
    made.close()
    made.close()
    assert not any(map(os.path.exists, paths))
