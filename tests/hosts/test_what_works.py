"""What works on one host works on several: records, checkpoints, cells, stacks, interrupts, values."""

from __future__ import annotations

import importlib

import pytest
import torch
from shared_cluster import until
from torch import nn

import nbdist
from nbdist.errors import EngineError
from nbdist.telemetry.record import records

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
DATA = X, X.sum(1, keepdim=True).sin()
OPTIONS = {"loss": "mse", "optimizer": "adamw", "lr": 0.01, "batch_size": 64}


BESIDE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, x):
        return self.layer(x)

class Files(torch.utils.data.Dataset):
    def __init__(self, path, length):
        self.path, self.length = path, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        with open(self.path) as file:
            number = float(file.read())
        return torch.full((6,), number), torch.zeros(1)
"""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A module in a folder that only this host has, imported before the engines start."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "a_module_beside.py").write_text(BESIDE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("a_module_beside")


@pytest.fixture(scope="module")
def cluster(beside, _fork_server):
    """An engine on each of three hosts, one of them this one."""
    with nbdist.Cluster(hosts={"local": 1, "h1": 1, "h2": 1}, device="cpu", spares=0) as started:
        yield started


def bits(trained: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in trained.parameters()]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 1)


def test_the_record_of_a_run_is_whole_on_the_notebooks_host(cluster):
    run = cluster.train(model(), DATA, epochs=2, **OPTIONS)
    folder = records() / run.run_id
    for rank in range(3):
        lines = (folder / f"rank{rank}.jsonl").read_text().splitlines()
        assert '"event": "RunStarted"' in lines[0]
        assert '"event": "RunFinished"' in lines[-1]


def test_a_checkpoint_folder_that_hosts_do_not_share_is_refused_at_once(cluster):
    """Each host's own /tmp; a resume would miss the files of the others."""
    with pytest.raises(EngineError, match=r"the ranks do not share the folder .* host h1 does not see"):
        cluster.train(model(), DATA, epochs=1, checkpoint="/tmp/of-this-host", **OPTIONS)


def test_a_run_is_resumed_from_a_folder_that_all_hosts_see(cluster, shared):
    cluster.train(whole := model(), DATA, epochs=2, **OPTIONS)
    cluster.train(model(), DATA, epochs=1, checkpoint=str(shared), **OPTIONS)
    cluster.train(resumed := model(), DATA, epochs=2, resume=str(shared), **OPTIONS)
    assert bits(resumed) == bits(whole)


def test_cells_run_on_all_hosts_and_their_stacks_are_read_there(cluster):
    cell = cluster.execute("import socket\nname = socket.gethostname()\nwhile True:\n    pass")
    until(lambda: [rank.state for rank in cluster.where().ranks] == ["working"] * 3)
    assert all(rank.place.endswith(("line 3", "line 4")) for rank in cluster.where().ranks)
    cluster.interrupt()
    with pytest.raises(EngineError, match="KeyboardInterrupt"):
        cell.wait()
    assert [cluster.pull("name", rank) for rank in range(3)] == ["head", "h1", "h2"]
    cluster.check_ready()


def test_values_travel_and_memory_is_that_of_the_host(cluster):
    cluster.push(given=torch.arange(4.0))
    assert all(torch.equal(cluster.pull("given", rank), torch.arange(4.0)) for rank in range(3))
    assert all(cluster.memory(engine) > 1 << 20 for engine in cluster.engines)


def test_a_function_at_the_end_of_each_epoch_runs_in_the_notebook(cluster):
    """With the notebook's own model, which has the weights after that epoch."""
    trained, seen = model(), []
    cluster.train(
        trained, DATA, epochs=3, each_epoch=lambda model, row: seen.append((row["epoch"], bits(model))), **OPTIONS
    )
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == bits(trained)
    assert seen[0][1] != seen[1][1]


def test_weights_and_values_reach_each_host_once(cluster, network):
    """Two MB travel to two hosts once; a prediction, and the model, come back."""
    before = {host: network.bytes(host) for host in ("h1", "h2")}
    cluster.push(large=torch.ones(500_000))
    moved = [network.bytes(host)[1] - before[host][1] for host in ("h1", "h2")]
    assert all(2_000_000 < nbytes < 2_300_000 for nbytes in moved)
    assert cluster.predict(nn.Identity(), torch.arange(3000.0).view(-1, 1), batch_size=64).tolist()[-1] == [2999.0]


def test_a_failed_cell_is_debugged_on_another_host(cluster):
    with pytest.raises(EngineError, match="division by zero"):
        cluster.execute("x = 41 + rank\nif rank == 1:\n    1 / 0").wait()
    shown, lines = [], ["p x", "q"]
    cluster.debug(1, lambda prompt: lines.pop(0), shown.append)
    assert "rank 1: ZeroDivisionError" in shown[0]
    assert shown[1].strip() == "42"
    assert cluster.pull("rank", 1) == 1


def test_a_module_beside_the_notebook_travels(cluster, beside, network):
    """Also where its file is not; in cells too."""
    assert network.run("h1", f"ls {beside.__file__}").startswith("ls: cannot access")
    cluster.train(trained := beside.Net(), DATA, epochs=2, **OPTIONS)
    cluster.execute("import a_module_beside as m\nmodule = m.Net.__module__").wait()
    assert [cluster.pull("module", rank) for rank in range(3)] == ["a_module_beside"] * 3
    assert type(trained) is beside.Net


def test_data_that_a_host_cannot_open_is_named_with_the_host(cluster, beside, tmp_path):
    (tmp_path / "number").write_text("3")
    data = beside.Files(str(tmp_path / "number"), 96)
    with pytest.raises(EngineError, match=rf"^rank.* on h[12].*: FileNotFoundError: .*{tmp_path}/number"):
        cluster.train(model(), data, epochs=1, **OPTIONS)
