"""The mesh, and the strategy words for one."""

from __future__ import annotations

import pytest

from nbdist.errors import PlanError
from nbdist.plan import Mesh


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("data", {"dp": 3}), ("ddp", {"dp": 3}), ("DDP", {"dp": 3}), (" data ", {"dp": 3}), ("dp=3", {"dp": 3}),
        (" dp = 3 ", {"dp": 3}), ("shard", {"shard": 3}), ("fsdp", {"shard": 3}), ("pipeline", {"pp": 3}),
        ("pp", {"pp": 3}), ("tensor", {"tp": 3}), ("tp", {"tp": 3}), ("tp=3,pp=1", {"tp": 3}),
    ],
)  # fmt: skip
def test_a_strategy_is_a_mesh(strategy, expected):
    """A word puts all ranks on its axis; a mesh may be written out."""
    mesh = Mesh.parse(strategy, 3)
    ((axis, degree),) = expected.items()
    assert (Mesh(**expected), 3, f"{axis}={degree}") == (mesh, mesh.size, str(mesh))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("dat", r"unknown strategy 'dat': use data, ddp, .* or a mesh such as dp=3\. Did you mean 'data'\?"),
        ("", "unknown strategy ''"),
        (3, "unknown strategy 3"),
        ("dp=", "unknown strategy 'dp='"),
        ("dp=-1", "unknown strategy 'dp=-1'"),
        ("ep=3", "unknown mesh axis 'ep' in strategy 'ep=3': use data, ddp"),
        ("dp=3,dp=1", "mesh axis 'dp' stands twice in strategy 'dp=3,dp=1'"),
        ("dp=0", "mesh axis dp=0 must be at least 1"),
        ("dp=2", "strategy 'dp=2' needs 2 ranks, but there are 3: use dp=3, or start 2 engines"),
        ("dp=2,pp=2", "strategy 'dp=2,pp=2' needs 4 ranks, but there are 3: use dp=3, or start 4 engines"),
    ],
)
def test_what_is_no_strategy_is_refused(strategy, message):
    """The error names the word and the alternatives."""
    with pytest.raises(PlanError, match=message):
        Mesh.parse(strategy, 3)


def test_ranks_lie_on_the_mesh_with_tp_neighbours():
    """The axes in their order, the last one runs fastest; rank 0 is at the origin."""
    mesh = Mesh(pp=2, dp=2, tp=2)
    assert "dp=2,pp=2,tp=2" == str(mesh)
    assert [[0, 1], [2, 3], [4, 5], [6, 7]] == mesh.groups("tp")
    assert [[0, 2], [1, 3], [4, 6], [5, 7]] == mesh.groups("pp")
    assert [[0, 4], [1, 5], [2, 6], [3, 7]] == mesh.groups("dp") == mesh.groups("dp", "shard")
    assert [[0, 1, 2, 3], [4, 5, 6, 7]] == mesh.groups("pp", "shard", "tp")
    assert [[0, 1, 2, 3, 4, 5, 6, 7]] == mesh.groups("pp", "dp", "tp")
    assert [(0, 0, 0), (1, 1, 1)] == [tuple(mesh.coordinate(r, axis) for axis in ("pp", "dp", "tp")) for r in (0, 7)]


def test_neighbours_and_some_of_a_line():
    """A ring closes; two ranks make one pair. Ranks that are left out are groups of one."""
    mesh = Mesh(pp=4, dp=2)
    assert [(0, 1), (0, 3), (1, 2), (2, 3), (4, 5), (4, 7), (5, 6), (6, 7)] == mesh.ring("pp")
    assert [(0, 1)] == Mesh(pp=2).ring("pp")
    assert [[0, 3], [4, 7], [1], [2], [5], [6]] == mesh.groups_of("pp", (3, 0))
