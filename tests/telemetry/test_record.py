"""The paths of records, and the removal of old ones."""

from __future__ import annotations

import json
from pathlib import Path

from nbdist.telemetry import JsonlSink
from nbdist.telemetry.host import host_name
from nbdist.telemetry.record import KEPT_RUNS, new_run_id, record_path, records


def test_records_lie_in_a_home_that_can_be_set(monkeypatch, home, tmp_path):
    """``$NBDIST_HOME``, else the user's state folder."""
    assert home / "runs" == records()
    monkeypatch.delenv("NBDIST_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert tmp_path / "nbdist" / "runs" == records()
    monkeypatch.delenv("XDG_STATE_HOME")
    assert Path.home() / ".local" / "state" / "nbdist" / "runs" == records()


def test_old_records_go_when_a_run_begins(home):
    """Rank 0 keeps the newest ones, by name; other ranks remove nothing, and other files stay."""
    names = [f"2026{i:04d}-000000-abcd" for i in range(KEPT_RUNS + 5)]
    for name in names:
        (home / "runs" / name).mkdir(parents=True)
        (home / "runs" / name / "rank0.jsonl").write_text("{}")
    note = home / "runs" / "0000-note.txt"
    note.write_text("mine")
    assert home / "runs" / "new" / "rank1.jsonl" == record_path("new", 1)
    assert len(list((home / "runs").iterdir())) == KEPT_RUNS + 6
    assert home / "runs" / "new" / "rank0.jsonl" == record_path("new", 0)
    assert sorted([*names[5:], note.name]) == sorted(path.name for path in (home / "runs").iterdir())


def test_names_of_runs_differ():
    """Two runs of the same second have two names, which sort by time and fit into a path."""
    names = {new_run_id() for _ in range(20)}
    assert len(names) > 15
    assert all(name.replace("-", "").isalnum() for name in names)


def began(folder, name, *events, host=None):
    """A record of a run that has begun, with more events."""
    reported = [
        {"event": "RunStarted", "rank": 0, "host": host or host_name()},
        *({"event": event} for event in events),
    ]
    (folder / name).mkdir(parents=True)
    (folder / name / "rank0.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in reported))
    return folder / name


def test_the_record_of_a_run_that_goes_on_stays(home):
    """With any number of newer ones: a record that is being written here, on rank 0 or another rank."""
    runs = home / "runs"
    for name in ("2025-a", "2025-b"):
        began(runs, name)
    (runs / "2025-b" / "rank1.jsonl").touch()
    sinks = [JsonlSink(runs / "2025-a" / "rank0.jsonl"), JsonlSink(runs / "2025-b" / "rank1.jsonl")]
    for i in range(KEPT_RUNS):
        began(runs, f"2026{i:04d}", "RunFinished")
    record_path("new", 0)
    assert ["2025-a", "2025-b"] == sorted(path.name for path in runs.glob("2025*"))
    for sink in sinks:
        sink.close()
    record_path("newer", 0)
    assert [] == [*runs.glob("2025*")]


def test_another_hosts_record_stays_until_it_holds_its_end(home):
    """Only that host can see whether its run is alive."""
    runs = home / "runs"
    began(runs, "2025-a", host="elsewhere")
    began(runs, "2025-b", "RunFinished", host="elsewhere")
    began(runs, "2025-c", "RunFailed", host="elsewhere")
    began(runs, "2025-d")
    for i in range(KEPT_RUNS):
        began(runs, f"2026{i:04d}", "RunFinished")
    record_path("new", 0)
    assert ["2025-a"] == [path.name for path in runs.glob("2025*")]
