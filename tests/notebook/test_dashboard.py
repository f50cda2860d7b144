"""The display of a run, live and afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nbdist
from nbdist.errors import EngineError
from nbdist.notebook.dashboard import LineDashboard, make_dashboard, remains

DATA = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)


def test_what_a_run_says_is_escaped(cluster):
    """An error message cannot become part of a page."""

    def hostile(output, target):
        raise ValueError("<script>alert(1)</script>")

    with pytest.raises(EngineError):
        cluster.train(nn.Linear(6, 3), DATA, loss=hostile)
    html = nbdist.last_run()._repr_html_()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html


def test_what_remains_needs_no_kernel(cluster):
    """HTML and text, which need no widget manager or script."""
    run = cluster.train(nn.Linear(6, 3), DATA, loss="cross_entropy", epochs=2, batch_size=16, val=DATA)
    kept = remains(run)
    assert {"text/html", "text/plain"} == set(kept)
    assert '<img alt="' in kept["text/html"]
    assert all(line.startswith("nbdist: ") for line in kept["text/plain"].splitlines())


def test_without_a_front_end_there_are_lines(notebook):
    """A shell in a terminal gets text."""
    assert isinstance(make_dashboard(notebook.shell), LineDashboard)
