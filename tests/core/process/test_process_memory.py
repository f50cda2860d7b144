"""Memory: malloc's pages during a run, frozen objects, and memory after an out-of-memory error."""

from __future__ import annotations

import resource
import subprocess
import sys
import traceback
import weakref

import pytest
import torch

from nbdist.core.process.memory import free_frames

pytestmark = pytest.mark.programs

STEPS = """
import platform, resource, sys
import psutil, torch
from nbdist.core.process.memory import keep_freed_pages
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):  # as a step frees its activations: the last block first, then the one below it
        blocks = [torch.ones(2**18) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
with keep_freed_pages():
    faults()
    kept = faults()
    held = psutil.Process().memory_info().rss
    large = torch.ones(2**24)
    del large
    grown = psutil.Process().memory_info().rss
print(platform.libc_ver()[0], faults(), kept, grown - held, grown - psutil.Process().memory_info().rss)
"""


def test_freed_memory_stays_for_the_next_step_and_goes_in_the_end():
    """Inside no page faults per step, without thousands; afterwards the memory is returned to the system."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    libc, outside, inside, grown, given_back = done.stdout.split()
    if libc != "glibc":
        pytest.skip("another C library keeps its own counsel")
    mib = 2**20
    assert int(inside) < 100
    assert int(outside) > 10 * max(1, int(inside))
    assert int(grown) > 50 * mib, "64 MiB that were freed are kept inside"
    assert int(given_back) > 50 * mib
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt


LARGE = """
import platform, resource, torch
from nbdist.core.process.memory import keep_freed_pages, keep_large_pages
torch.set_num_threads(1)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keep_freed_pages(return_large=True):
    faults()
    returned = faults()
    keep_large_pages()
    print(platform.libc_ver()[0], returned, min(faults() for _ in range(6)))  # a system may take cold pages away
"""


def test_large_blocks_are_kept_from_the_second_step_of_a_sharded_model_on():
    """Until then they are returned, with a page fault for each page of the next one."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    libc, returned, kept = done.stdout.split()
    if libc != "glibc":
        pytest.skip("another C library keeps its own counsel")
    assert int(returned) > 100 * max(1, int(kept))


def test_objects_that_stay_are_not_looked_at_meanwhile():
    """The outermost run freezes and unfreezes; if objects were frozen before, nothing changes."""
    code = """
import gc
from nbdist.core.process.memory import frozen_gc
with frozen_gc():
    inside = gc.get_freeze_count()
print(inside > 10_000, gc.get_freeze_count())
with frozen_gc():
    with frozen_gc():
        pass
    print(gc.get_freeze_count() > 10_000)
print(gc.get_freeze_count())
with frozen_gc():
    print(gc.get_freeze_count() > 10_000)
gc.freeze()
with frozen_gc():
    pass
print(gc.get_freeze_count() > 10_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ["True", "0", "True", "0", "True", "True"] == done.stdout.split()


class Large:
    """In place of a model."""


def failing(error):
    """Raise while a frame holds an object; returns the error and a weak reference to the object."""

    def step(model):
        raise error

    model = Large()
    reference = weakref.ref(model)
    try:
        step(model)
    except type(error) as caught:
        del model
        return caught, reference


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("can't start new thread"),
    ],
    ids=["MemoryError", "cuda", "cpu", "thread"],
)
def test_frames_of_an_error_hold_nothing_once_memory_has_run_out(error):
    """The traceback can still be read."""
    caught, reference = failing(error)
    assert reference() is not None
    free_frames(caught)
    assert reference() is None
    assert traceback.extract_tb(caught.__traceback__)[-1].name == "step"


def test_the_cause_of_an_error_holds_nothing_either():
    """The cause counts too: user code often raises its own error from it."""
    cause, reference = failing(MemoryError())
    error = ValueError("too large")
    error.__cause__ = cause
    free_frames(error)
    assert reference() is None


def test_other_errors_keep_their_variables_for_a_debugger():
    """Other errors keep their variables."""
    caught, reference = failing(RuntimeError("no"))
    free_frames(caught)
    assert reference() is not None
