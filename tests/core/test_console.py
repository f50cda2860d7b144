"""Rank 0's terminal under torchrun: all ranks, live; lines of text if standard error is not a terminal."""

from __future__ import annotations

import re
import subprocess
import sys

import pexpect
import pytest

pytestmark = pytest.mark.programs

SCRIPT = """
import os, torch, nbdist
from torch.nn import functional as F
class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        row = torch.ones(4), torch.ones(1)
        yield from [row] * 64
        while not os.path.exists(os.environ["SEEN"]):
            yield row
def loss(output, target):
    if "FAIL" in os.environ:
        raise ValueError("torn on purpose")
    return F.mse_loss(output, target)
nbdist.train(torch.nn.Linear(4, 1), Rows(), loss=loss, batch_size=8)
"""
ESCAPE = "\x1b"
WAIT_S = 300


@pytest.fixture
def command(tmp_path):
    """torchrun with two ranks."""
    (tmp_path / "train.py").write_text(SCRIPT)
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "train.py")]


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Training goes on until this file is there."""
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


@pytest.fixture
def terminal(home, seen):
    """Start a command in a terminal."""
    started = []

    def start(command, **variables):
        env = {"TERM": "xterm", "PATH": "/usr/bin:/bin", "NBDIST_HOME": str(home), "SEEN": str(seen), **variables}
        started.append(
            pexpect.spawn(sys.executable, command, dimensions=(40, 120), encoding="utf-8", timeout=WAIT_S, env=env)
        )
        return started[-1]

    yield start
    for terminal in started:
        terminal.close(force=True)


def test_a_terminal_shows_all_ranks(command, terminal, seen):
    """While they run and at the end."""
    shown = terminal(command)
    shown.expect(r"1 +cpu +running")
    seen.touch()
    shown.expect(pexpect.EOF)
    last = shown.before.rpartition("Linear (5 parameters)")[2]
    assert "finished" in last
    assert re.search(r"0 +cpu +finished +(\d+) .*1 +cpu +finished +\1 ", last, re.DOTALL)


def test_a_failure_stays_on_the_screen(command, terminal):
    """With its reason, above the traceback; plain python, one rank."""
    shown = terminal(command[-1:], FAIL="yes")
    shown.expect(pexpect.EOF)
    assert re.search(r"0 +cpu +failed", re.sub(ESCAPE + r"\[[0-9;]*m", "", shown.before))
    assert "torn on purpose" in shown.before


def test_without_a_terminal_there_are_lines(command, home, seen):
    """Without terminal codes."""
    seen.touch()
    done = subprocess.run([sys.executable, *command[-1:]], capture_output=True, text=True)
    assert 0 == done.returncode
    assert ESCAPE not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("nbdist: ")]
    assert "nbdist: finished" == lines[-1]
