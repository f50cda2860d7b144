"""What nbdist uses of `multiprocessing` and of torch's loading processes."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader

from nbdist.core.data.workers import EndsWithRank
from nbdist.upstream import multiprocessing_private

Own = namedtuple("Own", "x y")
Own.__module__ = "a_notebook"  # as on an engine, where no module has the classes of the notebook


def loaded(collate):
    """Two batches, made by a loading process."""
    return list(
        DataLoader(range(4), batch_size=2, num_workers=1, collate_fn=collate, worker_init_fn=EndsWithRank(None))
    )


def test_a_class_of_no_module_comes_from_a_loading_process():
    """All batches are of one class."""
    first, second = loaded(lambda rows: Own(torch.tensor(rows), len(rows)))
    assert [[0, 1], 2, [2, 3], 2] == [first.x.tolist(), first.y, second.x.tolist(), second.y]
    assert type(first) is type(second)


def test_what_cannot_be_sent_raises_in_the_rank():
    """With the reason and the cure, where torch waits for ever."""
    with pytest.raises(TypeError, match=r"a loading process cannot send its batch: .*generator.*use num_workers=0"):
        loaded(lambda rows: (row for row in rows))


def test_only_loading_processes_are_changed():
    """This one is not."""
    loaded(torch.tensor)
    assert not hasattr(multiprocessing_private.reduction.ForkingPickler, "reducer_override")
    assert multiprocessing_private._send_error is not multiprocessing_private.queues.Queue._on_queue_feeder_error
