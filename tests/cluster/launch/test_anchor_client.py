"""The anchor of a detached cluster, as the kernel that asks it sees it."""

from __future__ import annotations

import gc
import json
import os
import re

import pytest

from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.core.transfer.payload import Segment, open_segment
from nbdist.errors import ClusterError, PlanError
from nbdist.telemetry import host


@pytest.fixture
def anchor(home, tmp_path):
    """One that lives, with a folder of its own."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    started = Anchor.start(str(folder), 60.0)
    yield started
    started.end()


class Collecting:
    """A connection on which Python collects garbage in the middle of an exchange."""

    def __init__(self, pipe):
        self.pipe = pipe

    def send(self, words):
        self.pipe.send(words)
        gc.collect()

    def __getattr__(self, name):
        return getattr(self.pipe, name)


def forgotten(holder):
    """A segment that only the garbage collector finds; returns its path."""
    knot = [Segment(10, holder)]
    knot.append(knot)
    return knot[0].path


def test_memory_is_forgotten_in_the_middle_of_an_exchange(anchor, monkeypatch):
    """A segment that is collected while the kernel waits for an answer locks nothing up, and its memory goes."""
    gc.disable()
    try:
        path = forgotten(anchor)
        monkeypatch.setattr(anchor, "_pipe", Collecting(anchor._pipe))
        anchor.note("name", 1)
        assert {"name": 1} == anchor.look()["notes"]
    finally:
        gc.enable()
    with pytest.raises(ClusterError, match="is gone"):
        open_segment(path)


def test_closed_memory_is_gone_at_once(anchor):
    """Closing waits until the anchor has let go too."""
    segment = Segment(10, anchor)
    os.close(open_segment(segment.path))
    segment.close()
    with pytest.raises(ClusterError, match="is gone"):
        open_segment(segment.path)


@pytest.mark.parametrize(("host_id", "left"), [("another boot/pid:[1]", False), ("{boot}/pid:[1]", True)])
def test_a_cluster_of_this_host_from_before_it_was_started_anew_is_forgotten(home, host_id, left):
    """One in another container, that sees other processes, is not: the sentence says where it is."""
    boot = host.host_id().partition("/")[0]
    told = {"folder": "/no", "mark": "1:1.00", "patience_s": 60, "host": host.host_name()}
    (home / "clusters").mkdir()
    entry = home / "clusters" / "abcd.json"
    entry.write_text(json.dumps({**told, "host_id": host_id.format(boot=boot)}))
    where = f"cluster abcd was started in another container on {host.host_name()}" if left else "no detached cluster"
    with pytest.raises(PlanError, match=re.escape(where)):
        Anchor.reach("abcd")
    assert left == entry.exists()


def test_memory_may_be_let_go_when_the_anchor_has_ended(anchor):
    """Nothing is left to let go of then, and nothing is raised."""
    segments = [Segment(10, anchor) for _ in range(2)]
    anchor.end()
    segments.pop().close()
    del segments
