"""IPython in a terminal: the run is drawn where it stands."""

from __future__ import annotations

import re
import sys

import pexpect
import pytest
from net import NET


@pytest.fixture
def ipython(home, tmp_path):
    """A real IPython in a terminal of its own."""
    (tmp_path / "mine.py").write_text(NET)
    terminal = pexpect.spawn(
        sys.executable, ["-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor"], encoding="utf-8",
        dimensions=(50, 130), timeout=60, cwd=str(tmp_path),
        env={"TERM": "xterm", "PATH": "/usr/bin:/bin", "NBDIST_HOME": str(home), "IPYTHONDIR": str(tmp_path)},
    )  # fmt: skip
    terminal.expect(r"In \[1\]: ")
    yield lambda line: _run(terminal, line)
    terminal.sendline("%dist_stop --all")
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()


def _run(terminal, line):
    terminal.sendline(line)
    terminal.expect(r"In \[\d+\]: ")
    return terminal.before


def test_a_terminal_shows_the_run(ipython):
    """All ranks, live and at the end; in the background, lines leave the prompt alone."""
    ipython("%load_ext nbdist")
    ipython("from mine import *")
    assert "started 2 engines" in ipython("%dist_start -n 2 --device cpu")
    shown = ipython("run = %dist_train model train_set --loss cross_entropy --epochs 300 --batch-size 16")
    assert re.search(r"1 +cpu +(running|starting|waiting)", shown)
    assert re.search(r"1 +cpu +finished +1200", shown)
    assert "\x1b[1A" in shown
    shown = ipython("run = %dist_train model train_set --loss cross_entropy --epochs 2 --background; run.wait()")
    assert "\x1b[1A" not in shown
