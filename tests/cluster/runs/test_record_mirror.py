"""The record mirror: what ranks of other hosts have recorded is whole on this one after the run."""

from __future__ import annotations

import types

from nbdist.cluster.hosts.host import HostFacts
from nbdist.cluster.hosts.local_host import LocalHost
from nbdist.cluster.runs.record_mirror import RecordMirror
from nbdist.engine.parent_watch import RECORDS
from nbdist.telemetry.record import record_path, records


def test_lines_after_the_last_request_are_copied(tmp_path):
    """Its answer came before the rank's last line, and is looked at only at the end."""
    host = LocalHost(HostFacts(name="h1", host_id="1", cores=1), tmp_path, "")
    engines = types.SimpleNamespace(anchor=None, share_memory=False, host_id="head", by_host=lambda: {host: [0]})
    there = record_path("run", 0, tmp_path / RECORDS)
    there.parent.mkdir(parents=True)
    mirror = RecordMirror(engines, "run")
    mirror.poll()
    there.write_text('{"kind": "run_ended"}\n')
    mirror.finish()
    assert record_path("run", 0, records()).read_text() == there.read_text()
