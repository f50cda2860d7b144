"""Failures of several ranks, merged into one error with its cause."""

from __future__ import annotations

import linecache
import os
import re
import site
import traceback
from dataclasses import replace

import pytest
import torch

from nbdist.engine.failure import LOST, Failure, as_error
from nbdist.engine.follow.cell_sources import add_cells
from nbdist.engine.stack_frames import is_users
from nbdist.errors import EngineError, PeerLostError, PlanError, TaskError, ranks_text


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([1, 0], "ranks 0-1"), ([0, 1, 2, 5], "ranks 0-2,5"), ([4, 2, 0], "ranks 0,2,4"),
     ([7, 7], "rank 7"), (range(8), "ranks 0-7")],
)  # fmt: skip
def test_ranks_are_named_as_ranges(ranks, text):
    """Consecutive ranks become a range; order and repetition do not matter."""
    assert ranks_text(ranks) == text


def failure(rank, time_s, message="torn", *, secondary=False, place="Cell In[3], line 2"):
    return Failure(rank=rank, time_s=time_s, kind="ValueError", message=message, place=place,
                   traceback=f"traceback of {rank}", secondary=secondary)  # fmt: skip


@pytest.mark.parametrize(
    ("failures", "rank", "message"),
    [
        ([failure(0, 1.0, "gone", secondary=True), failure(1, 2.0)], 1,
         "rank 1: ValueError: torn (Cell In[3], line 2)"),
        ([failure(0, 2.0, "later"), failure(2, 1.0)], 2, "rank 2: ValueError: torn (Cell In[3], line 2)"),
        ([failure(r, r) for r in (0, 1, 3)], 0, "ranks 0-1,3: ValueError: torn (Cell In[3], line 2)"),
        ([failure(0, 1), failure(1, 2, place="line 9")], 0, "rank 0: ValueError: torn (Cell In[3], line 2)"),
        ([failure(0, 2.0, "gone", secondary=True), failure(1, 1.0, "gone", secondary=True)], 1,
         "ranks 0-1: ValueError: gone (Cell In[3], line 2)"),
        ([failure(1, 1.0, place="")], 1, "rank 1: ValueError: torn"),
        ([failure(0, 1.0, "gone", secondary=True),
          replace(failure(1, 2.0, "ended", secondary=True, place=""), kind=LOST)], 1, "rank 1: EngineLost: ended"),
    ],
    ids=["a cause before an earlier secondary failure", "the earliest cause",
         "ranks with the same cause are named together", "another place is another cause",
         "secondary failures alone", "no place known", "a loss that is known later than its peer's error"],
)  # fmt: skip
def test_one_error_for_all_ranks(failures, rank, message):
    """The earliest failure that is not secondary is the cause; its rank and traceback come with it."""
    error = as_error(failures)
    assert (str(error), error.rank, error.remote_traceback) == (message, rank, f"traceback of {rank}")


@pytest.mark.parametrize("kind", [PlanError, TaskError])
def test_an_engines_plan_error_is_a_plan_error(kind):
    """`except PlanError` catches it wherever it was raised; it is shown as any EngineError."""
    error = as_error([replace(failure(1, 1.0), kind=kind.__name__)])
    assert isinstance(error, kind)
    assert isinstance(error, EngineError)
    assert "EngineError" == type(error).__name__
    assert not isinstance(as_error([failure(1, 1.0)]), ValueError)


def raised(source, file_name="<cell>"):
    try:
        exec(compile(source, file_name, "exec"), {"PeerLostError": PeerLostError, "PlanError": PlanError})
    except Exception as error:
        return Failure.of(1, error)


def test_a_failure_names_the_cell_and_shows_its_lines():
    """The innermost line of a cell is the place, though the error was raised deeper, in a library."""
    source = "import json\ndef read(text):\n    return json.loads(text)\n\nread('torn')\n"
    add_cells({"<cell>": ("Cell In[4]", source)})
    failed = raised(source)
    linecache.cache.pop("<cell>")
    assert (failed.rank, failed.kind, failed.place) == (1, "JSONDecodeError", "Cell In[4], line 3")
    assert not failed.secondary
    shown = failed.traceback.splitlines()
    assert "---->   3     return json.loads(text)" in shown
    assert "---->   5 read('torn')" in shown
    assert any("json/decoder.py, line" in line for line in shown)
    assert shown[-1].startswith("json.decoder.JSONDecodeError: Expecting value")


def test_only_the_loss_of_a_peer_is_secondary():
    """Everything else may be the cause."""
    assert raised("raise PeerLostError('another rank is gone')").secondary
    assert not raised("raise ConnectionError('the network is gone')").secondary


def test_our_own_frames_are_no_place():
    """An error in nbdist names no line of nbdist as if it were the user's."""
    from nbdist.plan import Mesh

    try:
        Mesh.parse("dp=3", 2)
    except PlanError as error:
        error.__traceback__ = error.__traceback__.tb_next  # without this test's own frame
        failed = Failure.of(0, error)
    assert (failed.place, failed.traceback) == ("", "")


class Torn(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise ValueError(f"sample {index} is torn")


def test_an_error_in_a_data_loading_worker_names_the_line_of_the_user():
    """Not torch's, which raises it again, and not the traceback that torch puts into the message."""
    loading = iter(torch.utils.data.DataLoader(Torn(), num_workers=1))
    try:
        next(loading)
    except ValueError as error:
        failure = Failure.of(0, error)
    loading._shutdown_workers()
    assert ("ValueError", "sample 0 is torn (in DataLoader worker process 0)") == (failure.kind, failure.message)
    assert re.search(r"test_failure\.py, line \d+$", failure.place)
    assert 'raise ValueError(f"sample {index} is torn")' in failure.traceback
    assert "torch/utils/data" not in failure.traceback


@pytest.mark.parametrize(
    ("file", "users"),
    [
        (os.path.join(site.getusersitepackages(), "timm", "layers.py"), False),
        (os.path.join(os.path.dirname(torch.__file__), "nn", "functional.py"), False),
        (os.__file__, False),
        ("<string>", False),
        (__file__, True),
        (os.path.join(os.path.expanduser("~"), "project", "model.py"), True),
    ],
)
def test_a_library_is_not_the_users_own(file, users):
    """Wherever it was installed: for a user alone, say."""
    assert users == is_users(traceback.FrameSummary(file, 1, "forward", lookup_line=False))
