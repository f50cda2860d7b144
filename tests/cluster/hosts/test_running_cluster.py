"""A running cluster of ipyparallel: how it is named; `tests/hosts/test_launchers.py` has one."""

from __future__ import annotations

import json

import pytest

from nbdist import Cluster
from nbdist.cluster.hosts.running_cluster import EngineShells, _controller_address, connection_file
from nbdist.errors import PlanError


@pytest.fixture
def security(tmp_path, monkeypatch):
    """The folder of connection files of a profile `users`."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    folder = tmp_path / "profile_users" / "security"
    folder.mkdir(parents=True)
    return folder


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path.resolve())


def test_it_is_named_by_a_file_of_its_own_or_its_profile(security):
    client = write(security / "ipcontroller-a-client.json", {"registration": 7})
    cluster = {"cluster_id": "a", "profile_dir": str(security.parent)}
    about = write(security / "cluster-a.json", {"cluster": cluster, "controller": {}})
    assert connection_file(client, None) == connection_file(about, None) == connection_file(None, "users") == client


def test_what_names_none_is_one_sentence(security, tmp_path):
    for name, content in (("nothing", None), ("text", "x"), ("list", "[]"), ("other", "{}")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(PlanError, match="is no connection file of a running ipyparallel cluster"):
            Cluster(connect=str(tmp_path / name))
    with pytest.raises(PlanError, match="there is no IPython profile 'nobody'"):
        Cluster(profile="nobody")
    with pytest.raises(PlanError, match="no ipyparallel cluster runs in profile 'users'"):
        Cluster(profile="users")
    for number in "ab":
        write(security / f"ipcontroller-{number}-client.json", {})
    with pytest.raises(PlanError, match="profile 'users' has 2 ipyparallel clusters: --connect one of "):
        Cluster(profile="users")
    with pytest.raises(PlanError, match="connect and profile exclude each other"):
        Cluster(connect="a", profile="b")


def test_where_its_controller_is():
    """At the address that it listens on, or on the host that it names."""
    assert _controller_address({"interface": "tcp://10.0.0.1", "location": "head"}) == "10.0.0.1"
    for interface in ("tcp://*", "tcp://127.0.0.1", "tcp://0.0.0.0"):
        assert _controller_address({"interface": interface, "location": "head"}) == "head"


def test_an_agent_is_started_through_an_engine_with_its_python():
    shells = EngineShells(file="f", engines={"h1": (0, 2)}, pythons={"h1": "/opt/python"}, addresses={"h1": ""})
    *_, file, host, engines, line = shells.agent_command("h1")
    assert (file, host, engines) == ("f", "h1", "0,2")
    assert line.startswith("exec /opt/python -c ")
    assert shells.real_name("h1") == "h1"
