"""The anchor of a detached cluster, from the kernel's side."""

from __future__ import annotations

import gc
import json
import os
import re

import pytest

from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.core.transfer.payload import Segment
from nbdist.errors import ClusterError, PlanError
from nbdist.segment_path import open_segment
from nbdist.telemetry import host

pytestmark = pytest.mark.programs


@pytest.fixture
def anchor(home, tmp_path):
    """A running anchor with its own folder."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    started = Anchor.start(str(folder), 60.0)
    yield started
    started.end()


class Collecting:
    """A connection on which Python collects garbage in the middle of a request."""

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


def test_memory_is_released_in_the_middle_of_a_request(anchor, monkeypatch):
    """A segment collected while the kernel waits for a reply causes no deadlock, and its memory is freed."""
    gc.disable()
    try:
        path = forgotten(anchor)
        monkeypatch.setattr(anchor, "_pipe", Collecting(anchor._pipe))
        anchor.note("name", 1)
        assert {"name": 1} == anchor.state()["notes"]
    finally:
        gc.enable()
    with pytest.raises(ClusterError, match="is gone"):
        open_segment(path)


def test_closed_memory_is_gone_at_once(anchor):
    """Closing waits until the anchor has released it too."""
    segment = Segment(10, anchor)
    os.close(open_segment(segment.path))
    segment.close()
    with pytest.raises(ClusterError, match="is gone"):
        open_segment(segment.path)


@pytest.mark.parametrize(("host_id", "left"), [("another boot/pid:[1]", False), ("{boot}/pid:[1]", True)])
def test_a_cluster_from_before_a_reboot_is_removed(home, host_id, left):
    """One in another container, that sees other processes, is not: the sentence says where it is."""
    boot = host.host_id().partition("/")[0]
    facts = {"folder": "/no", "mark": "1:1.00", "patience_s": 60, "host": host.host_name()}
    (home / "clusters").mkdir()
    entry = home / "clusters" / "abcd.json"
    entry.write_text(json.dumps({**facts, "host_id": host_id.format(boot=boot)}))
    where = f"cluster abcd was started in another container on {host.host_name()}" if left else "no detached cluster"
    with pytest.raises(PlanError, match=re.escape(where)):
        Anchor.reach("abcd")
    assert left == entry.exists()


def test_memory_may_be_released_when_the_anchor_has_ended(anchor):
    """Nothing is left to release then, and nothing is raised."""
    segments = [Segment(10, anchor) for _ in range(2)]
    anchor.end()
    segments.pop().close()
    del segments
