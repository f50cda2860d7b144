"""ssh: the command of an agent, the user's settings of it, and the address towards a host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from nbdist.cluster.hosts.ssh import Ssh
from nbdist.errors import PlanError

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """``ssh`` and ``python3`` that say how they are called, alone on the path."""
    for name in ("ssh", "python3"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_python_is_the_same_path_where_it_exists_and_else_that_of_the_host(programs, monkeypatch):
    """What the other host's shell does with the command."""
    *_, host, remote = Ssh().agent_command("h1")
    assert host == "h1"
    monkeypatch.setattr(sys, "executable", str(programs / "nowhere"))
    elsewhere = Ssh().agent_command("h1")[-1]
    assert sys.executable in elsewhere
    ran = subprocess.run(["sh", "-c", elsewhere], capture_output=True, text=True, check=True).stdout
    assert ran == "python3 -c from nbdist.cluster.hosts.agent_server import main; main()\n"
    assert remote.startswith('exec "$(command -v ')


def test_settings_of_ipyparallel_are_honoured(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    (tmp_path / "profile_default").mkdir()
    assert Ssh.of_user() == Ssh()
    (tmp_path / "profile_default" / "ipcluster_config.py").write_text(
        "c = get_config()\nc.SSHLauncher.ssh_args = ['-p', '2222']\nc.SSHEngineLauncher.remote_python = '/opt/python'\n"
    )
    ssh = Ssh.of_user()
    assert ssh == Ssh(arguments=("-p", "2222"), python="/opt/python")
    command = ssh.agent_command("h1")
    assert (command[:3], command[-2]) == (["ssh", "-p", "2222"], "h1")  # ssh takes the first of two settings
    assert command[-1].startswith("exec /opt/python -c ")


@needs_ssh
def test_names_are_those_of_the_users_settings(tmp_path):
    """An alias that only ssh knows; nothing is sent to it."""
    settings = tmp_path / "config"
    settings.write_text("Host big\n  HostName 127.0.0.1\n")
    assert Ssh(arguments=("-F", str(settings))).address_towards(["big"]) == "127.0.0.1"


@pytest.mark.parametrize(
    ("hosts", "interface", "sentence"),
    [
        (["no-such-host.invalid"], None, "the address of host no-such-host.invalid is not known here"),
        (["127.0.0.1"], "eth77", "this host has no interface 'eth77'"),
    ],
)
@needs_ssh
def test_a_host_that_cannot_be_found_is_one_sentence(hosts, interface, sentence):
    with pytest.raises(PlanError, match=sentence):
        Ssh().address_towards(hosts, interface)


def test_an_interface_is_chosen_by_name_or_address():
    assert Ssh().address_towards(["anything"], "127.0.0.1") == "127.0.0.1"
