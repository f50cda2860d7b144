"""IPython in a terminal: the run is redrawn in place."""

from __future__ import annotations

import sys

import pexpect
import pytest
from net import NET
from shared_cluster import HUNG_S

pytestmark = pytest.mark.programs

HELD = """

def held(output, target):
    import os, time
    while not os.path.exists("go on"):
        time.sleep(0.01)
    return F.cross_entropy(output, target)
"""


@pytest.fixture
def ipython(home, tmp_path):
    """A real IPython in a terminal of its own."""
    (tmp_path / "mine.py").write_text(NET + HELD)
    terminal = pexpect.spawn(
        sys.executable, ["-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor"], encoding="utf-8",
        dimensions=(50, 130), timeout=HUNG_S, cwd=str(tmp_path),
        env={"TERM": "xterm", "PATH": "/usr/bin:/bin", "NBDIST_HOME": str(home), "IPYTHONDIR": str(tmp_path)},
    )  # fmt: skip
    terminal.expect(r"In \[1\]: ")
    yield terminal
    terminal.sendline("%dist_stop --all")
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()


def _run(terminal, line):
    terminal.sendline(line)
    terminal.expect(r"In \[\d+\]: ")
    return terminal.before


def test_a_terminal_shows_the_run(ipython, tmp_path):
    """All ranks, live and at the end; in the background, lines leave the prompt alone."""
    _run(ipython, "%load_ext nbdist")
    _run(ipython, "from mine import *")
    assert "started 2 engines" in _run(ipython, "%dist_start -n 2 --device cpu")
    ipython.sendline("run = %dist_train model train_set --loss held --epochs 3 --batch-size 16")
    ipython.expect(r"1 +cpu +(running|starting|waiting)")
    (tmp_path / "go on").touch()
    ipython.expect(r"1 +cpu +finished +12")
    assert "\x1b[1A" in ipython.before
    ipython.expect(r"In \[\d+\]: ")
    shown = _run(ipython, "run = %dist_train model train_set --loss cross_entropy --epochs 2 --background; run.wait()")
    assert "\x1b[1A" not in shown
