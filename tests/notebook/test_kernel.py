"""A whole notebook in a real kernel: its outputs, ■, and the end of the kernel."""

from __future__ import annotations

import re

import pytest
from kernels import Kernel
from shared_cluster import gone, until

from nbdist.plan.option import explained, flag
from nbdist.plan.plan import OPTIONS

pytestmark = pytest.mark.programs

WIDGET = "application/vnd.jupyter.widget-view+json"
ENDLESS = "--steps 1000000000"


def test_a_start_says_what_is_being_done_in_one_line(kernel):
    """It changes while the engines start, and a saved notebook keeps the result."""
    (line,) = kernel.started.outputs
    *before, last = (shown["text/plain"] for shown in [*line["before"], line["data"]])
    assert ["loading torch ...", "forming the world ..."] == [before[0], before[-1]]
    assert set(before[1:-1]) <= {f"{ready} of 2 engines are ready ..." for ready in range(2)}
    assert len(set(before)) == len(before)
    assert re.fullmatch(r"started 2 engines \(ranks 0-1\) on \S+: cpu over shared memory, .* each, in [\d.]+ s", last)
    (line,) = kernel("%dist_start").outputs
    assert line["data"]["text/plain"].startswith("already running: 2 engines (ranks 0-1)")
    assert line["before"] == []


def test_a_start_loads_what_a_panel_consists_of(kernel):
    """In the background: the first run need not."""
    loaded = kernel(
        "import sys, threading\n"
        "for thread in threading.enumerate():\n    if thread.name == 'nbdist-panel': thread.join()\n"
        "print('anywidget' in sys.modules)"
    )
    assert loaded.printed == "True\n"


def test_a_training_leaves_a_static_picture(kernel):
    """HTML and text that a saved notebook keeps, once, and no widget; the cell's value is not shown a second time."""
    cell = kernel(
        "%dist_train model train_set --loss cross_entropy --optimizer adamw --lr 1e-2 --epochs 2 --batch-size 16 "
        "--val test_set --metric accuracy -o run"
    )
    (picture,) = cell.rich
    assert set(picture) == {"text/html", "text/plain"}
    for part in ("Net (21 parameters) on dp=2", "finished", "step 8/8", "val_accuracy"):
        assert part in picture["text/html"]
        assert part in picture["text/plain"]
    assert WIDGET not in picture
    assert cell.printed == ""
    later = kernel("run")
    assert later.rich == [picture]
    assert kernel("print(run.state, run.history[-1]['steps'])").printed == "finished 4\n"


def test_a_training_is_a_live_panel_while_it_runs(kernel):
    """A widget with the same text beside it, replaced at the end."""
    live = []

    def look(cell):
        live.extend(set(data) for data in cell.rich if WIDGET in data)
        return bool(live)

    cell = kernel.run(f"%dist_train model train_set --loss cross_entropy {ENDLESS}", when=look)
    assert live[0] == {WIDGET, "text/html", "text/plain"}
    (picture,) = cell.rich
    assert set(picture) == {"text/html", "text/plain"}
    assert "stopped" in picture["text/plain"]


def test_the_button_stops_all_ranks_after_the_same_step(kernel):
    """The weights are loaded, the cell fails as interrupted, so that Run All stops, and the next cell works."""
    kernel("before = model.body.weight.detach().clone()")
    kernel(
        "def loud(output, target):\n    print('going')\n    return F.cross_entropy(output, target)\n"
        "import nbdist, torch"
    )
    cell = kernel.run(f"%dist_train model train_set --loss loud {ENDLESS}", when=lambda cell: "going" in cell.printed)
    assert (cell.status, cell.reply["ename"]) == ("error", "KeyboardInterrupt")
    reported = kernel(
        "run = nbdist.last_run()\n"
        "steps = {rank.step for rank in run.progress.ranks.values()}\n"
        "print(run.state, steps == {run.history[-1]['steps']}, torch.equal(before, model.body.weight))"
    )
    assert reported.printed == "stopped True False\n"
    assert "finished" in kernel("%dist_train model train_set --loss cross_entropy --steps 1").rich[0]["text/plain"]


@pytest.mark.parametrize("cell_is_busy", [True, False], ids=["in a running cell", "in the background"])
def test_the_stop_of_the_panel_ends_the_run_in_good_order(kernel, cell_is_busy):
    """The weights are loaded and nothing fails, while the cell still runs and after it has ended."""
    kernel("before = model.body.weight.detach().clone()")
    train = f"run = %dist_train model train_set --loss cross_entropy {ENDLESS}"
    if cell_is_busy:
        subshell = kernel.subshell()
        if subshell is None:
            pytest.skip("this ipykernel has no subshells: only ■ stops a running cell")

        def displayed(cell):
            """Nobody can press the button before; the comm is open earlier, when nothing listens to it yet."""
            return any(WIDGET in data for data in cell.rich)

        cell = kernel.run(train, when=displayed, then=lambda cell: kernel.press_stop(subshell))
        assert cell.status == "ok"
    else:
        kernel(f"{train} --background")
        kernel("while run.progress.step < 3: run.wait(0.05)")
        kernel.press_stop()
    reported = kernel("print(run.wait().state, torch.equal(before, model.body.weight))")
    assert reported.printed == "stopped False\n"


def test_the_button_frees_a_cell_on_the_engines(kernel):
    """Their names are still there afterwards, and the next cell works."""
    cell = kernel.run(
        "%%dist\nkept = rank\nprint('going', flush=True)\nwhile True: pass",
        when=lambda cell: "going" in cell.printed,
    )
    assert (cell.status, cell.reply["ename"]) == ("error", "KeyboardInterrupt")
    assert kernel("%%dist\nkept").printed == "[0] Out: 0\n[1] Out: 1\n"


def test_a_failing_cell_fails(kernel):
    """Run All stops there; the error is shown in one piece, by rank, cell and line."""
    cell = kernel.run("%%dist_train model train_set\nx, t = batch\nloss = F.cross_entropy(x, wrong)")
    assert (cell.status, cell.reply["ename"]) == ("error", "EngineError")
    assert cell.reply["evalue"].startswith("ranks 0-1: NameError: name 'wrong' is not defined (Cell In[")
    assert cell.reply["evalue"].endswith("], line 3)")
    shown = "\n".join(cell.reply["traceback"])
    assert "---->   3 loss = F.cross_entropy(x, wrong)" in shown
    assert "nbdist/" not in shown
    (picture,) = cell.rich
    assert "failed" in picture["text/plain"]
    assert "ranks 0-1: NameError" in picture["text/html"]

    cell = kernel.run("%%dist\n1 / 0")
    assert (cell.status, cell.reply["ename"]) == ("error", "EngineError")
    cell = kernel.run("%dist_train modle train_set --loss mse")
    assert (cell.status, cell.reply["ename"]) == ("error", "TaskError")
    assert len(cell.reply["traceback"]) == 1


def test_what_a_notebook_defines_just_works(kernel):
    """Zero-argument super, closures, a class edited and run again, a module beside the notebook, a background run."""
    kernel(
        "class Base(nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
        "        self.body = nn.Linear(6, width)\n\n"
        "class Net2(Base):\n    def __init__(self):\n        super().__init__(3)\n\n"
        "    def forward(self, x):\n        print('first')\n        return self.body(x)\n"
        "def by(factor):\n    def loss(output, target):\n        return F.cross_entropy(output, target) * factor\n"
        "    return loss\n"
        "model2 = Net2()"
    )
    assert "[0-1] first" in kernel("%dist_train model2 train_set --loss by(2) --steps 1").printed
    kernel(
        "class Net2(Base):\n    def __init__(self):\n        super().__init__(3)\n\n"
        "    def forward(self, x):\n        print('second')\n        return super().__getattr__('body')(x)\n"
        "model2 = Net2()"
    )
    assert kernel("%dist_train model2 train_set --loss by(2) --steps 1").printed == "[0-1] second\n"
    kernel("import beside\nmodel3 = beside.Beside(6, 3)")
    kernel("run3 = %dist_train model3 train_set --loss cross_entropy --steps 1 --background")
    assert kernel("print(run3.wait().state)").printed == "finished\n"


def test_the_help_reads_well(kernel):
    """`%dist_train?` opens a page that explains every option."""
    (page,) = kernel("%dist_train?").reply["payload"]
    text = page["data"]["text/plain"]
    for name, option in OPTIONS.items():
        assert flag(name) in text
        assert explained(option, flag)[:40] in " ".join(text.split()), name


def test_nothing_is_left_of_a_kernel_that_was_shut_down(shared_cluster, tmp_path):
    """As Jupyter does when a notebook is closed, here in the middle of a training."""
    kernel = Kernel(tmp_path)
    kernel("%load_ext nbdist")
    kernel("%dist_start -n 2 --device cpu\nimport torch")
    kernel(
        "run = %dist_train torch.nn.Linear(6,1) (torch.ones(9,6),torch.ones(9,1)) --loss mse --background " + ENDLESS
    )
    kernel("while run.progress.step < 3: run.wait(0.05)")
    processes, folder = kernel.cluster()
    assert len(processes) >= 5
    kernel.shut_down()
    assert gone(processes)
    until(lambda: not folder.exists())
