"""`%dist_start --detach` and `%dist_attach` in two kernels, one after the other."""

from __future__ import annotations

import re

import pytest
from gate import Gate
from kernels import GATE, Kernel
from net import NET

pytestmark = pytest.mark.programs


def test_a_new_kernel_brings_the_trained_model_home(shared_cluster, tmp_path):
    """It shows the waiting cluster and the panel with its history, and ends with the trained model under its name.

    The first one ends as when a user closes the notebook; `tests/cluster` and `tests/browser` kill it.
    """
    first = Kernel(tmp_path)
    try:
        first("%load_ext nbdist")
        started = first("%dist_start -n 2 --device cpu --detach").printed
        name = started.partition("%dist_attach ")[2].split()[0]
        assert f"they live 1 h 00 min without this kernel: %dist_attach {name} takes them over" in started
        first(NET)
        first("%%dist\nclass Reported:\n    word = 'kept'")
        first(f"{GATE}\nheld = Gate('.', 10)")
        train = "%dist_train model train_set --loss cross_entropy --batch-size 16 --epochs 10 --background -o run"
        cell = first(f"{train} --lr-scheduler held\nheld.wait(10, run=run)\nrun.run_id")
        run_id = cell.rich[-1]["text/plain"].strip("'")
    finally:
        first.shut_down()
    second = Kernel(tmp_path)
    try:
        second(f"%load_ext nbdist\n{GATE}")
        listed = second("%dist_clusters").rich[0]["text/plain"]
        assert name in listed
        assert run_id in listed
        assert re.search(r"nobody, ends in (1 h 00|[1-5]?\d) min", listed)
        taken = second("%dist_attach -o run")
        assert f"took over cluster {name}: 2 engines" in taken.printed
        assert second.panels
        Gate(tmp_path).open()
        ended = second("(run.wait().state, run.run_id, run.progress.step, len(run.history), run.history[0]['epoch'])")
        assert ended.rich[-1]["text/plain"] == f"('finished', '{run_id}', 40, 10, 1)"
        reported = second("%%dist\nprint(Reported.word)").printed
        assert reported == "[0-1] kept\n"
        model = second("import nbdist\ntype(model).__name__, nbdist.current_cluster().name")
        assert model.rich[-1]["text/plain"] == f"('Net', '{name}')"
    finally:
        second("%dist_stop --all")
        assert "no detached cluster lives" in second("%dist_clusters").printed
        second.shut_down()
