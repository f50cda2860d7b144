"""Tab: options and values of the magics, and an engine's own names."""

from __future__ import annotations

import pytest
from kernels import Kernel
from net import NET

from nbdist.core.optim.optimizers import OPTIMIZERS
from nbdist.core.task.losses import LOSSES
from nbdist.core.task.metrics import METRICS
from nbdist.notebook.completion import complete, complete_line
from nbdist.plan import known_names


def texts(notebook, text):
    """The completions at the end of a cell."""
    lines = text.split("\n")
    found = complete(notebook.shell, text, len(lines) - 1, len(lines[-1]))
    return None if found is None else found[1]


def test_the_words_are_those_that_core_knows():
    """Help and completion name the same words."""
    assert (known_names.LOSSES, known_names.METRICS) == (tuple(LOSSES), tuple(METRICS))
    assert known_names.OPTIMIZERS == tuple(sorted(OPTIMIZERS))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%dist_train m", ["model"]),
        ("run = %dist_train m", ["model"]),
        ("%dist_train model t", ["train_set", "test_set"]),
        ("%dist_train model train_set --val te", ["test_set"]),
        ("%dist_train model train_set --stra", ["--strategy"]),
        (
            "%dist_train model train_set --checkpoint-",
            ["--checkpoint-every", "--checkpoint-frozen", "--checkpoint-keep"],
        ),
        ("%dist_train model train_set --strategy pi", ["pipeline"]),
        ("%dist_train model train_set --strategy d", ["data", "ddp", "dp=2"]),
        ("%dist_train model train_set --optimizer adamw", ["adamw"]),
        ("%dist_train model train_set --loss l1 --opt", ["--optimizer"]),
        ("%dist_train model train_set --loss my", ["my_loss"]),
        ("%dist_train model train_set --precision b", ["bf16"]),
        ("%dist_train model train_set --shuffle ", ["yes", "no"]),
        ("%dist_train model train_set --lr ra", ["rate"]),
        ("%dist_train model train_set --split-at body --sched", ["--schedule-by", "--schedule"]),
        ("%%dist_train model train_set --sched", ["--schedule-by", "--schedule"]),
        ("%dist_start --dev", ["--device"]),
        ("%dist_start --device c", ["cpu", "cuda"]),
        ("%dist_run st", ["stop"]),
        ("%dist_push train_set mod", ["model"]),
        ("%dist_help dist_tr", ["dist_train", "dist_train"]),
        ("%%dist --l", ["--local"]),
        ("%dist_stop ", ["--all"]),
    ],
)
def test_options_and_values(notebook, line, expected):
    """Where each is allowed; names are those of objects that fit."""
    notebook.names["rate"] = 0.1
    notebook(NET + "def my_loss(output, target): return F.cross_entropy(output, target)")
    assert expected == texts(notebook, line)


@pytest.mark.parametrize(
    "line", ["", "model.", "%timeit mod", "%dist_train model (X, ", "print('%dist_train ", "%dist_nothing x"]
)
def test_elsewhere_it_keeps_out(notebook, line):
    """Python completes those, within brackets too."""
    assert texts(notebook, line) is None


def test_meshes_are_those_of_the_engines(monkeypatch):
    """Every product of degrees, as whole words; the typed part is not repeated."""
    from nbdist.notebook import completion

    four = type("Four", (), {"size": 4})()
    monkeypatch.setattr(completion, "current_cluster", lambda: four)
    token, found = complete_line("%dist_train m d --strategy dp=2,", {})
    assert ("", ["pp=2", "shard=2", "tp=2"]) == (token, found)
    assert ("pp", ["pp=4", "pp=2,dp=2", "pp=2,shard=2", "pp=2,tp=2"]) == (
        "pp", [text for text in complete_line("%dist_train m d --strategy pp", {})[1] if "=" in text],
    )  # fmt: skip


def test_nothing_of_the_users_is_run(notebook):
    """No property, no length, no representation."""
    notebook("class Touchy:\n    def __getattribute__(self, name): raise SystemError(name)\ntouchy = Touchy()")
    assert "touchy" not in texts(notebook, "%dist_train ")
    assert ["touchy"] == texts(notebook, "%dist_push touch")


def test_a_cell_on_engines_completes_from_an_engine(notebook):
    """Its live objects, on the first chosen rank."""
    notebook("%%dist\nclass There: pass\nthere = There()\nif rank == 1: there.only_one = 1\nthere.everywhere = 2")
    assert texts(notebook, "%%dist\nx = there.ev")[0].endswith("everywhere")
    assert not texts(notebook, "%%dist\nthere.only")
    assert texts(notebook, "%%dist --ranks 1\nthere.only")[0].endswith("only_one")
    assert "there" in texts(notebook, "%dist_pull the")


def test_busy_engines_are_not_asked(notebook):
    """Nor waited for."""
    run = notebook("%dist_train model train_set --loss cross_entropy --steps 1000000000 --background")
    assert not texts(notebook, "%%dist\nran")
    assert not run.ended
    run.stop()
    run.wait()
    assert "rank" in texts(notebook, "%%dist\nran")


@pytest.mark.programs
def test_a_front_end_gets_them(home, tmp_path):
    """Through the kernel's own protocol, and without torch being loaded for it."""
    kernel = Kernel(tmp_path)
    try:
        kernel("%load_ext nbdist")
        reply = kernel.complete("run = %dist_train model data --stra")
        assert "--strategy" in reply["matches"]
        assert "--stra" == "run = %dist_train model data --stra"[reply["cursor_start"] : reply["cursor_end"]]
        assert ["sgd"] == kernel.complete("%dist_train model data --optimizer sg")["matches"]
        assert "False" in kernel("import sys; print('torch' in sys.modules)").printed
        kernel("%unload_ext nbdist")
        assert "--strategy" not in kernel.complete("%dist_train model data --stra")["matches"]
    finally:
        kernel.shut_down()
