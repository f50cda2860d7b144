"""The mesh, and the words that stand for one."""

from __future__ import annotations

import pytest

from nbdist.errors import PlanError
from nbdist.plan import Mesh


@pytest.mark.parametrize("strategy", ["data", "ddp", "DDP", " data ", "dp=3", " dp = 3 "])
def test_a_strategy_is_a_mesh(strategy):
    """A word lays all ranks on its axis; a mesh may be written out."""
    mesh = Mesh.parse(strategy, 3)
    assert (Mesh(dp=3), 3, "dp=3") == (mesh, mesh.size, str(mesh))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("dat", r"unknown strategy 'dat': use data, ddp or dp=3\. Did you mean 'data'\?"),
        ("", "unknown strategy ''"),
        (3, "unknown strategy 3"),
        ("dp=", "unknown strategy 'dp='"),
        ("dp=-1", "unknown strategy 'dp=-1'"),
        ("pp=3", "unknown mesh axis 'pp' in strategy 'pp=3': use data, ddp or dp=3"),
        ("dp=3,dp=1", "mesh axis 'dp' stands twice in strategy 'dp=3,dp=1'"),
        ("dp=0", "mesh axis dp=0 must be at least 1"),
        ("dp=2", "strategy 'dp=2' needs 2 ranks, but there are 3: use dp=3, or start 2 engines"),
    ],
)
def test_what_is_no_strategy_is_refused(strategy, message):
    """The error names the word and what can be had."""
    with pytest.raises(PlanError, match=message):
        Mesh.parse(strategy, 3)
