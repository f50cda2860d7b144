"""Payloads, states and snapshots of engines whose host is taken for another one: copied there once, and back."""

from __future__ import annotations

import pytest
import torch
from shared_cluster import ENGINES, until
from tasks import classes, copied, net

from nbdist.cluster.hosts.local_host import LocalHost
from nbdist.cluster.runs.host_snapshots import HostSnapshots
from nbdist.core.state.snapshot import SnapshotStore


@pytest.fixture
def apart(cluster, monkeypatch):
    """Engines that are taken for those of another host, though signals still reach them directly."""
    monkeypatch.setattr(LocalHost, "here", False)
    return cluster


def trained(cluster):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run = cluster.train(model, classes(), loss="cross_entropy", optimizer=optimizer, epochs=2, batch_size=16, seed=1)
    return run, copied(model), optimizer.state_dict()


def test_a_training_gives_the_same_bits(cluster, monkeypatch):
    """Model, data, weights and the optimizer's state are copied."""
    _, here, state = trained(cluster)
    monkeypatch.setattr(LocalHost, "here", False)
    run, there, state_there = trained(cluster)
    assert run.state == "finished"
    assert {rank.step for rank in run.progress.ranks.values()} == {run.history[-1]["steps"] * 2}
    torch.testing.assert_close((here, state), (there, state_there), rtol=0, atol=0)


def test_states_arrive_during_a_run(apart):
    """Progress, rates and the loss curve of every rank."""
    run = apart.train(net(), classes(), loss="cross_entropy", steps=10**9, batch_size=16, background=True)
    until(lambda: len(run.progress.ranks) == ENGINES and all(rank.step > 3 for rank in run.progress.ranks.values()))
    run.stop()
    assert run.wait().state == "stopped"
    assert run.progress.curves["loss"]


def test_snapshots_are_kept_where_the_ranks_are_and_copied(cluster, monkeypatch):
    """A run resumes from the copies as it does from what ranks have written here."""

    def resumed() -> dict[str, torch.Tensor]:
        run = cluster.train(model := net(), classes(), loss="cross_entropy", steps=3, batch_size=16)
        stores.append(type(run.control.snapshot_store))
        assert cluster.resume(steps=6).progress.step == 6
        return copied(model)

    stores: list[type] = []
    here = resumed()
    monkeypatch.setattr(LocalHost, "here", False)
    torch.testing.assert_close(resumed(), here, rtol=0, atol=0)
    assert stores == [SnapshotStore, HostSnapshots]


def test_values_travel(apart):
    """To the engines, and back."""
    apart.push(given=torch.arange(5.0))
    apart.execute("given += rank").wait()
    for rank in range(ENGINES):
        torch.testing.assert_close(apart.pull("given", rank), torch.arange(5.0) + rank)


def test_a_host_gets_a_payload_once_and_frees_it(apart, monkeypatch):
    """However many engines it has; a run frees its own, a push when it is superseded or the engines end."""
    written, held = [], []
    write, release = LocalHost.write_memory, LocalHost.release
    monkeypatch.setattr(LocalHost, "write_memory", lambda *a: (written.append(a[1]), write(*a)))
    monkeypatch.setattr(LocalHost, "release", lambda *a: (held.extend(a[1]), release(*a)))
    apart.push(given=torch.arange(1000.0))
    assert len(written) == 1
    apart.train(net(), classes(), loss="cross_entropy", steps=3)
    run_payload = [path for path in written[1:] if path in held]
    assert run_payload
    assert written[0] not in held
    apart.stop()
    assert written[0] in held
    apart.start()
