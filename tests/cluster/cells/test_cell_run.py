"""Cells on engines: output, results, errors and interrupts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import types

import pytest
from shared_cluster import ENGINES, until

from nbdist.cluster.cells import cell_run
from nbdist.errors import ClusterError, EngineError, PlanError


def run(cluster, source, **options):
    cell = cluster.execute(source, **options)
    cell.wait()
    return cell


def test_a_cell_runs_on_the_ranks_that_were_named(cluster):
    """All by default; stdout, stderr, displays and results are known by rank."""
    source = "import sys; print(rank); print('no', file=sys.stderr); display({'text/plain': 'x'}, raw=True); 10 + rank"
    for ranks in (None, [1]):
        cell = run(cluster, source, ranks=ranks)
        chosen = [0, 1] if ranks is None else ranks
        assert cell.ranks == chosen
        assert cell.printed() == {rank: f"{rank}\n" for rank in chosen}
        assert cell.printed("stderr") == dict.fromkeys(chosen, "no\n")
        assert cell.results() == {rank: {"text/plain": str(10 + rank)} for rank in chosen}
        shown = {rank: [message["data"] for message in messages] for rank, messages in cell.displays().items()}
        assert shown == {rank: [{"text/plain": "x"}] for rank in chosen}


def test_all_that_was_printed_is_there_when_the_cell_is_done(cluster):
    """Output is sent apart from the result and may be later: without the wait, one in ten was cut short."""
    for _ in range(40):
        cell = run(cluster, "for i in range(100): print('line', i)")
        assert [text.count("\n") for text in cell.printed().values()] == [100] * ENGINES


def test_a_failure_is_shown_with_the_engines_own_source_lines(cluster):
    """One error names the ranks and the cause, and its traceback the cell by its number and the line."""
    cell = cluster.execute("def halve(x):\n    return 1 / x\n\nhalve(rank - rank)", number=7)
    with pytest.raises(EngineError, match=r"^ranks 0-1: ZeroDivisionError: division by zero$") as raised:
        cell.wait()
    assert raised.value.rank == 0
    for part in ("In[7]", "line 4", "line 2", "return 1 / x"):
        assert part in re.sub(r"\x1b\[[\d;]*m", "", raised.value.remote_traceback)


def test_a_failure_on_one_rank_leaves_the_others_their_result(cluster):
    """The error names that rank alone, and what the other one did is kept."""
    with pytest.raises(EngineError, match=r"^rank 1: KeyError: 'torn'") as raised:
        run(cluster, "done = rank\nif rank == 1: {}['torn']")
    assert raised.value.rank == 1
    assert cluster.pull("done", 0) == 0


def test_ranks_that_fail_differently_are_named_apart(cluster):
    """The first error is shown, the other one named with it."""
    with pytest.raises(EngineError, match=r"^rank 0: KeyError: 'a' \(rank 1 failed too: ValueError\)$"):
        run(cluster, "if rank == 0: {}['a']\nint('b')")


def test_a_rank_that_does_not_exist_is_refused_before_any_runs(cluster, untouched):
    """The error names the existing ranks."""
    with pytest.raises(PlanError, match="rank 5 does not exist: use 0 to 1"):
        cluster.execute("print('here')", ranks=[0, 5])


def test_an_interrupt_ends_a_cell_and_keeps_the_namespace(cluster):
    """Ctrl-C here, while a cell loops there, interrupts both sides; names defined before are still there."""
    cell = cluster.execute("kept = 5\nprint('in', flush=True)\nwhile True: pass")
    until(lambda: all(cell.printed().values()))
    pending = iter([True])  # one interrupt, once the wait has begun
    with pytest.raises(KeyboardInterrupt):
        cell.wait(lambda: os.kill(os.getpid(), signal.SIGINT) if next(pending, False) else None)
    assert cell.done()
    assert run(cluster, "print(kept)").printed() == dict.fromkeys(range(ENGINES), "5\n")


@pytest.mark.parametrize(
    ("end", "grad"), [("raise KeyboardInterrupt", True), ("1 / 0", False), ("pass", False)], ids=["stop", "fail", "end"]
)
def test_a_mode_that_an_interrupt_left_open_is_closed(cluster, end, grad):
    """It may land in the first line of `no_grad`; a cell that sets a mode itself and ends, or fails, has set it."""
    cell = cluster.execute(f"import torch\ntorch.no_grad().__enter__()\n{end}")
    with contextlib.suppress(EngineError):
        cell.wait()
    try:
        assert run(cluster, "print(torch.is_grad_enabled())").printed() == dict.fromkeys(range(ENGINES), f"{grad}\n")
    finally:
        run(cluster, "torch.set_grad_enabled(True)")


def test_a_collective_on_some_ranks_is_explained(cluster):
    """It would hang, so it raises; the next cell on all ranks may use collectives."""
    total = "import torch, torch.distributed as dist\nt = torch.ones(1)\ndist.all_reduce(t)\nprint(t.item())"
    with pytest.raises(EngineError, match=r"^rank 0: ClusterError: all_reduce is a collective: it waits for rank 1"):
        cluster.execute(total, [0]).wait()
    assert run(cluster, total).printed() == dict.fromkeys(range(ENGINES), "2.0\n")


def test_a_killed_engine_ends_the_cell_and_is_replaced(cluster):
    """The error says what to do; a start replaces only that engine."""
    cell = cluster.execute("kept = rank\nprint('in', flush=True)\nwhile rank: pass")
    until(lambda: all(cell.printed().values()))
    before = [engine.pid for engine in cluster.engines]
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(EngineError, match=r"^rank 1: the engine's process ended. %dist_start replaces it"):
        cell.wait()
    assert [engine.state for engine in cluster.engines] == ["idle", "lost"]
    with pytest.raises(ClusterError, match=r"engine of rank 1 is lost: %dist_start .* replaces it"):
        cluster.execute("pass")
    cluster.start()
    assert cluster.engines[0].pid == before[0]
    assert cluster.engines[1].pid not in before
    assert run(cluster, "print(rank, world_size, globals().get('kept'))").printed() == {0: "0 2 0\n", 1: "1 2 None\n"}


def test_a_rank_that_cannot_be_interrupted_is_named(cluster, monkeypatch):
    """It waits in a collective that the other one never enters: ■ ends the cell, and the next is refused, not hung."""
    monkeypatch.setattr(cell_run, "_INTERRUPTED_AFTER_S", 0.1)
    source = "import torch, torch.distributed\nprint('in', flush=True)\n"
    cell = cluster.execute(f"{source}if rank == 0: torch.distributed.all_reduce(torch.ones(1))")
    until(lambda: all(cell.printed().values()))
    pending = iter([True])
    with pytest.raises(KeyboardInterrupt, match="rank 0 did not react, perhaps inside a collective"):
        cell.wait(lambda: os.kill(os.getpid(), signal.SIGINT) if next(pending, False) else None)
    with pytest.raises(ClusterError, match=r"rank 0 did not react to an interrupt .*: %dist_stop ends it"):
        cluster.execute("pass")
    cluster.stop()


def test_a_long_cell_is_looked_at_less_and_less_often(cluster, monkeypatch, tmp_path):
    """In 300 s its stacks are looked at 8 times, not 75 as at equal intervals: a look sends every rank a signal."""
    go_file, clock, looks = tmp_path / "goes on", [0.0], []
    cell = cluster.execute(f"import os, time\nwhile not os.path.exists({str(go_file)!r}): time.sleep(0.005)")
    where = cell._where
    monkeypatch.setattr(cell, "_where", lambda: looks.append(clock[0]) or where())
    monkeypatch.setattr(cell_run, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(cell_run, "_POLL_S", 0.0)

    def a_second_later():
        clock[0] = min(clock[0] + 1, 300)
        if clock[0] == 300:
            go_file.touch()

    cell.wait(a_second_later)
    assert 8 == len(looks)
