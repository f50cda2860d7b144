"""A rank on a host that vanishes without a word is an error on all others, under torchrun too, and never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parent / "lost_peer.py")


@pytest.fixture
def ranks():
    """Three ranks as torchrun starts them: on head, h1 and h2."""
    processes = []
    for rank, host in enumerate(("head", "h1", "h2")):
        variables = {
            "RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": 29511, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        command = ["env", "-C", os.getcwd(), *(f"{name}={value}" for name, value in variables.items()), sys.executable]
        remote = [] if host == "head" else ["ssh", "-o", "BatchMode=yes", host]
        processes.append(
            subprocess.Popen([*remote, *command, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("fault", ["cut", "unplug", "crash"])
def test_a_vanished_host_is_an_error_on_the_others_and_they_leave_the_world(network, ranks, fault):
    for process in ranks:
        assert process.stdout.readline() == "formed\n"
    getattr(network, fault)("h2")
    for process in ranks[:2]:
        assert process.stdout.readline() == "lost\n"
        assert process.stdout.readline() == "left\n"
