"""What is drawn of a run is true, small and safe."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import nbdist
from nbdist.errors import EngineError
from nbdist.notebook.dashboard import LineDashboard, make_dashboard, panel_view

DATA = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)


def test_the_panel_follows_the_run_to_its_end(cluster):
    """Steps grow to the planned number, states and ranks are those of the engines, and all of it is JSON."""
    views = []
    run = cluster.train(nn.Linear(6, 3), DATA, loss="cross_entropy", epochs=3, batch_size=16, val=DATA,
                        watch=lambda run: views.append(panel_view(run)))  # fmt: skip
    assert json.loads(json.dumps(views)) == views
    shares = [view["share"] or 0 for view in views]
    assert shares == sorted(shares)
    last = views[-1]
    assert (last["title"], last["state"], last["error"], last["share"]) == (
        "Linear (21 parameters) on dp=2", "finished", "", 1.0,
    )  # fmt: skip
    assert last["step"] == "step 12 of 12"
    assert last["epoch"].startswith("epoch 3  loss ")
    assert f"loss {run.history[-1]['loss']:.4g} " in last["facts"]
    assert [(rank["rank"], rank["state"], rank["step"], rank["share"]) for rank in last["ranks"]] == [
        (rank, "finished", "12", 1.0) for rank in range(2)
    ]
    assert all(rank["device"].startswith("cpu") for rank in last["ranks"])


def test_a_run_without_an_end_has_no_share(cluster):
    """A stream of unknown length under epochs: steps are counted, no bar is drawn."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(6), 0)] * 40)

    views = []
    cluster.train(nn.Linear(6, 3), Stream(), loss="cross_entropy", batch_size=16, watch=lambda run: views.append(
        panel_view(run)))  # fmt: skip
    assert views[-1]["share"] is None
    assert views[-1]["step"] == "step 3"


def test_what_a_run_says_is_escaped(cluster):
    """An error message cannot become part of a page."""

    def hostile(output, target):
        raise ValueError("<script>alert(1)</script>")

    with pytest.raises(EngineError):
        cluster.train(nn.Linear(6, 3), DATA, loss=hostile)
    html = nbdist.last_run()._repr_html_()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script" not in html


def test_without_a_front_end_there_are_lines(notebook):
    """A shell in a terminal gets text."""
    assert isinstance(make_dashboard(notebook.shell), LineDashboard)
