"""Rank 0's terminal under torchrun: all ranks, live; lines of text if standard error is not a terminal."""

from __future__ import annotations

import re
import subprocess
import sys

import pexpect
import pytest

SCRIPT = """
import os, torch, nbdist
from torch.nn import functional as F
X = torch.randn(64, 4)
def slow(output, target):
    if "FAIL" in os.environ:
        raise ValueError("torn on purpose")
    return F.mse_loss(output, target)
nbdist.train(torch.nn.Linear(4, 1), (X, X[:, :1]), loss=slow, epochs=400, batch_size=8)
"""
ESCAPE = "\x1b"


@pytest.fixture
def command(tmp_path):
    """torchrun with two ranks."""
    (tmp_path / "train.py").write_text(SCRIPT)
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "train.py")]


def screen_of(command, **variables):
    """The bytes sent to a terminal, and its screen at the end."""
    env = {"TERM": "xterm", "PATH": "/usr/bin:/bin", **variables}
    terminal = pexpect.spawn(sys.executable, command, dimensions=(40, 120), encoding="utf-8", timeout=300, env=env)
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.before


def test_a_terminal_shows_all_ranks(command, home):
    """While they run and at the end."""
    shown = screen_of(command, NBDIST_HOME=str(home))
    assert re.search(r"1 +cpu +running", shown)
    last = shown.rpartition("Linear (5 parameters)")[2]
    assert "finished" in last
    assert re.search(r"0 +cpu +finished +3200", last)
    assert re.search(r"1 +cpu +finished +3200", last)


def test_a_failure_stays_on_the_screen(command, home):
    """With its reason, above the traceback; plain python, one rank."""
    shown = screen_of(command[-1:], NBDIST_HOME=str(home), FAIL="yes")
    assert re.search(r"0 +cpu +failed", re.sub(ESCAPE + r"\[[0-9;]*m", "", shown))
    assert "torn on purpose" in shown


def test_without_a_terminal_there_are_lines(command, home):
    """Without terminal codes."""
    done = subprocess.run([sys.executable, *command[-1:]], capture_output=True, text=True)
    assert 0 == done.returncode
    assert ESCAPE not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("nbdist: ")]
    assert "nbdist: finished" == lines[-1]
