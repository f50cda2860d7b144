"""Replay: replacement engines run the cells and get the pushes of their ranks."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from shared_cluster import ENGINES, kill_controller, until

pytestmark = pytest.mark.engines


def run(cluster, source, ranks=None, number=None):
    cell = cluster.execute(source, ranks, number=number)
    cell.wait()
    return cell.printed()


def lose(cluster, rank):
    os.kill(cluster.engines[rank].pid, signal.SIGKILL)
    until(lambda: cluster.engines[rank].state == "lost")


def test_a_replaced_engine_has_its_cells_and_pushes_in_order(cluster):
    """Each with the values it had then; the surviving engine runs nothing twice."""
    cluster.push(x=torch.tensor([2.0]), y=1)
    run(cluster, "def double(v): return v * 2\nseen = [double(x).item()]")
    cluster.push(x=torch.tensor([5.0]))
    run(cluster, "seen.append(double(x).item() + rank)")
    lose(cluster, 1)
    cluster.start()
    assert run(cluster, "print(seen, y, world_size)") == {0: "[4.0, 10.0] 1 2\n", 1: "[4.0, 11.0] 1 2\n"}


def test_cells_are_run_again_once(cluster):
    """However often the cluster checks whether it is ready; and once more on the next replacement."""
    run(cluster, "count = globals().get('count', 0) + 1")
    for _ in range(2):
        lose(cluster, 1)
        for _ in range(2):
            cluster.start()
        assert run(cluster, "print(count)") == dict.fromkeys(range(ENGINES), "1\n")


def test_only_cells_of_that_rank_that_succeeded_are_run_again(cluster):
    """Not those of other ranks, nor those that failed there."""
    run(cluster, "mine = 0", [0])
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run(cluster, "before = 1\nif rank: 1 / 0")
    lose(cluster, 1)
    cluster.start()
    assert run(cluster, "print('mine' in globals(), 'before' in globals())", [1]) == {1: "False False\n"}


def test_a_cell_that_fails_there_is_named_and_the_others_run(cluster):
    """A collective fails at once, as it lacks the other ranks; afterwards all form a world again."""
    run(cluster, "import torch, torch.distributed as dist\ndist.all_reduce(torch.ones(1))", number=7)
    run(cluster, "after = 3", number=8)
    lose(cluster, 0)
    with pytest.warns(UserWarning, match=r"^Cell In\[7\] was run again .* failed: it calls a collective, which"):
        cluster.start()
    total = "t = torch.ones(1)\ndist.all_reduce(t)\nprint(after, t.item())"
    assert run(cluster, "import torch, torch.distributed as dist\n" + total) == dict.fromkeys((0, 1), "3 2.0\n")


def test_an_engine_replaced_during_a_training_has_them_too(cluster):
    """The run does not wait for it: the next cell does."""
    run(cluster, "helper = 'here'")
    model, data = torch.nn.Linear(2, 1), (torch.randn(64, 2), torch.randn(64, 1))
    lose(cluster, 1)
    cluster.train(model, data, loss="mse", steps=3, batch_size=8)
    assert run(cluster, "print(helper)") == dict.fromkeys(range(ENGINES), "here\n")


def test_an_object_of_a_class_defined_on_both_sides_is_of_it_after_a_replacement(cluster):
    """The ids of classes are replayed too."""
    namespace = {"__name__": "__main__"}
    source = "class Box:\n    pass\n"
    exec(source, namespace)
    run(cluster, source)
    cluster.tie_classes(namespace)
    lose(cluster, 1)
    cluster.start()
    run(cluster, "box = Box()")
    assert type(cluster.pull("box", 1)) is namespace["Box"]


def test_a_restarted_cluster_has_everything_again(cluster):
    """After its controller was killed; after a `stop` it has nothing."""
    run(cluster, "kept = rank + 1")
    kill_controller(cluster)
    cluster.start()
    assert run(cluster, "print(kept)") == {0: "1\n", 1: "2\n"}
    cluster.stop()
    cluster.start()
    assert run(cluster, "print('kept' in globals())") == dict.fromkeys(range(ENGINES), "False\n")


@pytest.mark.parametrize(("limit", "value"), [("_PUSHED_BYTES", 10_000), ("_PUSHES", 2)])
def test_superseded_values_do_not_fill_the_memory(cluster, monkeypatch, limit, value):
    """Above a limit, of bytes or open files, the oldest push that was superseded is dropped."""
    monkeypatch.setattr(f"nbdist.cluster.cells.replay.{limit}", value)
    for number in range(5):
        cluster.push(big=torch.full((1000,), float(number)))
    assert len(cluster._replay._entries) <= 3
    lose(cluster, 1)
    cluster.start()
    assert run(cluster, "print(big[0].item())", [1]) == {1: "4.0\n"}
