"""Snapshots: whoever is killed, and whenever, what all ranks have completed is there, and whole."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random

import psutil
import pytest
import torch

from nbdist.core.state.snapshot import SLOTS, Slot, Vault, Vaults, newest, read
from nbdist.core.state.tensor_buffer import Layout

KILLS = 25


@pytest.fixture
def vaults():
    """Memory for two ranks."""
    made = Vaults(2)
    yield made
    made.close()


def filled(step, numel=64):
    return {"a": torch.full((numel,), float(step)), "b": torch.full((3,), step)}


def write(vault, step, ranks=2, ended=0, numel=64):
    """A snapshot whose every number is the step."""
    tensors = filled(step, numel)
    return vault.write((step, ended), ranks, Layout(tensors), tensors, f"{step}/{ended}")


def held(vaults):
    """The newest snapshot, looked through: its step, and what each rank told."""
    found = newest(vaults.paths)
    if found is None:
        return None
    step, slots = found
    for image in read(slots):
        for key in image.keys:
            assert (image.read(key) == step).all()
        assert image.text.startswith(f"{step}/")
    return step, [image.text for image in read(slots)]


def test_it_is_what_all_ranks_have(vaults):
    """A rank that is a step ahead does not count before the other is there."""
    first, second = map(Vault, vaults.paths)
    assert held(vaults) is None
    assert -1 == vaults.reached
    write(first, 1)
    assert held(vaults) is None
    assert 1 == vaults.reached
    write(second, 1)
    assert (1, ["1/0", "1/0"]) == held(vaults)
    write(first, 2)
    assert 1 == held(vaults)[0]
    write(second, 2)
    assert 2 == held(vaults)[0]
    assert 2 == vaults.reached


def test_in_any_order_a_step_apart():
    """Of all orders in which no rank is more than one ahead, each leaves the one that both have completed."""
    for order in itertools.product([0, 1], repeat=8):
        vaults = Vaults(2)
        own, steps = [Vault(paths) for paths in vaults.paths], [0, 0]
        for rank in order:
            if steps[rank] <= steps[1 - rank]:
                steps[rank] += 1
                write(own[rank], steps[rank])
                assert (min(steps) or None) == (held(vaults) or [None])[0]
        vaults.close()


def test_the_end_of_an_epoch_is_another_moment(vaults):
    """It has the same step as the last one in it; a rank that has only one of both must not be mixed with the other."""
    first, second = map(Vault, vaults.paths)
    write(first, 5)
    write(second, 5)
    write(first, 5, ended=1)
    assert (5, ["5/0", "5/0"]) == held(vaults)
    write(second, 5, ended=1)
    assert (5, ["5/1", "5/1"]) == held(vaults)


def test_the_same_moment_again_leaves_the_one_before(vaults):
    """A rank that is in error keeps what it may have kept already; another one is not there yet."""
    first, second = map(Vault, vaults.paths)
    for step in (1, 2):
        write(first, step)
        write(second, step)
    write(first, 3)
    write(first, 3)
    assert (2, ["2/0", "2/0"]) == held(vaults)
    write(second, 3)
    assert 3 == held(vaults)[0]


def test_two_slots_in_turn_and_the_third_while_one_is_pinned(vaults):
    """Memory for the third is only taken when a checkpoint is being written."""
    vault, other = map(Vault, vaults.paths)
    slots = [write(vault, step) for step in range(1, 5)]
    assert [slots[0], slots[1]] * 2 == slots
    assert [slot.path for slot in slots[:2]] == vaults.paths[0][:2]
    slots[3].pinned = True
    assert 3 == len({slots[3], *(write(vault, step) for step in range(5, 9))})
    image = read([slots[3]])[0]
    assert "4/0" == image.text
    slots[3].pinned = False
    after = [write(vault, step) for step in range(9, 13)]
    assert 2 == len(set(after))
    write(other, 12)
    assert 12 == held(vaults)[0]


def test_trimmed_it_holds_the_newest_and_nothing_else(vaults):
    """And can be written again."""
    own = [Vault(paths) for paths in vaults.paths]
    for step in (1, 2, 3):
        for vault in own:
            write(vault, step, numel=10_000)
    vaults.trim()
    assert 3 == held(vaults)[0]
    sizes = [os.stat(path.rpartition(":")[0]).st_size > 0 for paths in vaults.paths for path in paths]
    assert [True, False, False] * 2 == sizes
    again = [Vault(paths) for paths in vaults.paths]
    for vault in again:
        write(vault, 4, numel=20_000)
    assert 4 == held(vaults)[0]


def test_a_world_of_another_size(vaults):
    """It grows with the world; of fewer ranks, the snapshot is theirs; the other size's older one does not count."""
    for vault in map(Vault, vaults.paths):
        write(vault, 1)
    write(Vault(vaults.paths[0]), 2, ranks=1)
    assert (2, ["2/0"]) == held(vaults)
    vaults.grow(3)
    assert 3 == len(vaults.paths)
    for vault in map(Vault, vaults.paths):
        write(vault, 3, ranks=3)
    assert (3, ["3/0"] * 3) == held(vaults)
    assert newest(vaults.paths[:2]) is None or newest(vaults.paths[:2])[0] < 3


def test_a_larger_state_takes_more_room(vaults):
    """Each time, in memory that was made for less; who has it open from before sees it too."""
    own = [Vault(paths) for paths in vaults.paths]
    for step, numel in enumerate([1, 5000, 100_000, 7], start=1):
        for vault in own:
            write(vault, step, numel=numel)
        assert step == held(vaults)[0]
        assert numel == read(newest(vaults.paths)[1])[0].read("a").numel()


def write_forever(paths, ready):
    vault, tensors = Vault(paths), filled(0, 300_000)
    layout, first = Layout(tensors), max(0, *(Slot(path).head.step for path in paths)) + 1
    for step in itertools.count(first):
        for tensor in tensors.values():
            tensor.fill_(step)
        vault.write((step, 0), 1, layout, tensors, f"{step}/0")
        if step == first:
            ready.send_bytes(b"here")


def test_a_writer_that_is_killed_leaves_the_one_before(run_ranks):
    """kill -9 at any moment of writing 1.2 MB: always one is whole, and never an older one than before."""
    vaults, context = Vaults(1), multiprocessing.get_context("forkserver")
    moments, last = random.Random(0), 0
    for _ in range(KILLS):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=write_forever, args=(vaults.paths[0], there))
        process.start()
        here.recv_bytes()
        process.join(moments.random() * 0.02)
        process.kill()
        process.join()
        here.close()
        there.close()
        found = held(vaults)
        if found is not None:
            assert found[0] >= last
            last = found[0]
        process.close()
    assert last >= KILLS
    vaults.close()


def test_hundreds_leave_nothing_behind(vaults):
    """No file is left open, and no memory is kept, by who writes and by who reads."""

    def some():
        own = [Vault(paths) for paths in vaults.paths]
        for step in range(1, 30):
            for vault in own:
                write(vault, step, numel=100_000)
            held(vaults)

    process = psutil.Process()
    some()
    gc.collect()
    files, mapped = process.num_fds(), maps()
    for _ in range(10):
        some()
    gc.collect()
    assert files == process.num_fds()
    assert mapped == maps()


def maps():
    """How many segments this process has mapped."""
    with open("/proc/self/maps") as lines:
        return sum("memfd:nbdist" in line for line in lines)


def test_closed_memory_is_gone():
    """Twice is fine."""
    made = Vaults(2)
    paths = [path for own in made.paths for path in own]
    assert 2 * SLOTS == len(paths)
    made.close()
    made.close()
    assert not any(map(os.path.exists, paths))
