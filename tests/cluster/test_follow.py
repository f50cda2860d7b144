"""Engines follow the notebook: what has changed in it reaches them with each run and each cell."""

from __future__ import annotations

import importlib
import os
import sys
import time

import psutil
import pytest
import torch
from shared_cluster import gone
from tasks import classes, net

from nbdist.errors import TaskError


def prints(cluster, source, ranks=None):
    """What each rank prints for a cell."""
    cell = cluster.execute(source, ranks)
    cell.wait()
    return [text.strip() for text in cell.printed().values()]


def loss_of(run):
    return run.history[-1]["loss"]


def train(cluster, model=None, **options):
    """One step that changes nothing; its loss is what the step returns."""
    return cluster.train(model or net(), classes(8), optimizer="sgd", lr=1e-9, batch_size=8, check="no", **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The notebook's folder, first in its search path, and its modules, which no other test imports."""
    before = {*sys.modules}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in {*sys.modules} - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(path, text):
    """Write a module; its time differs from that of the text before, as an editor's would."""
    path.write_text(text)
    seconds = write.clock = getattr(write, "clock", time.time()) + 10
    os.utime(path, (seconds, seconds))
    importlib.invalidate_caches()


FACTOR = """
import torch

FACTOR = {0}


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return self.weight.sum() * 0 + {0}
"""


def scaled_loss(model, batch):
    output = model(batch[0])
    return output * (1 if isinstance(model, sys.modules[type(model).__module__].Scaled) else torch.nan)


def by_value(function):
    """A function as a notebook's cell defines it."""
    made = type(function)(function.__code__, {"__name__": "__main__", "sys": sys, "torch": torch, "os": os})
    made.__module__ = "__main__"
    return made


SCALED = by_value(scaled_loss)


def test_a_run_and_a_cell_see_folder_and_variables(cluster, folder, monkeypatch):
    """And what the notebook removes is gone; what a cell changed stays."""
    (folder / "value.txt").write_text("3")
    monkeypatch.setenv("FOLLOWED", "5")

    def step(model, batch):
        with open("value.txt") as file:
            return model(batch[0]).sum() * 0 + float(file.read()) * float(os.environ["FOLLOWED"])

    assert 15.0 == loss_of(train(cluster, step=by_value(step)))
    assert [f"{folder} 5"] * 2 == prints(cluster, "import os\nprint(os.getcwd(), os.environ['FOLLOWED'])")
    prints(cluster, "os.environ['FOLLOWED'] = '7'")
    monkeypatch.setenv("OTHER", "1")
    assert 21.0 == loss_of(train(cluster, step=by_value(step)))
    monkeypatch.delenv("FOLLOWED")
    assert ["None 1"] * 2 == prints(cluster, "print(os.environ.get('FOLLOWED'), os.environ['OTHER'])")


def test_variables_are_in_no_record(cluster, home, monkeypatch):
    """Nor in what the engines log."""
    monkeypatch.setenv("FOLLOWED_TOKEN", "very-secret")
    train(cluster, loss="cross_entropy")
    assert ["very-secret"] * 2 == prints(cluster, "import os\nprint(os.environ['FOLLOWED_TOKEN'])")
    files = [path for root in (home, os.path.realpath(cluster._up._launch.folder)) for path in _files(root)]
    assert files
    assert [] == [path for path in files if b"very-secret" in _content(path)]


def _files(root):
    return [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]


def _content(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # a socket
        return b""


def test_torchs_settings_follow(cluster):
    """A step that makes tensors of the default dtype gives the bits of the notebook."""

    def step(model, batch):
        return model(batch[0]).sum().double() * 0 + (torch.ones(1) / 3).double().sum()

    torch.set_default_dtype(torch.float64)
    try:
        run = train(cluster, step=by_value(step))
        shown = prints(
            cluster, "import torch\nprint(torch.get_default_dtype())\ntorch.set_default_dtype(torch.float16)"
        )
        assert ["torch.float16"] * 2 == prints(cluster, "print(torch.get_default_dtype())")
    finally:
        torch.set_default_dtype(torch.float32)
    assert (1 / 3, ["torch.float64"] * 2) == (loss_of(run), shown)
    assert ["torch.float32"] * 2 == prints(cluster, "print(torch.get_default_dtype())")


def test_a_reloaded_module_runs_its_new_text(cluster, folder):
    """Its classes are one on the engine; a module that was edited and not reloaded runs the old text."""
    write(folder / "followed_a.py", FACTOR.format(2))
    import followed_a

    assert 2.0 == loss_of(train(cluster, followed_a.Scaled(6, 3), step=SCALED))
    write(folder / "followed_a.py", FACTOR.format(4))
    assert 2.0 == loss_of(train(cluster, followed_a.Scaled(6, 3), step=SCALED))
    importlib.reload(followed_a)
    assert 4.0 == loss_of(train(cluster, followed_a.Scaled(6, 3), step=SCALED))
    assert ["4"] * 2 == prints(cluster, "import followed_a\nprint(followed_a.FACTOR)")


def test_a_module_that_was_edited_before_the_engines_import_it_runs_the_old_text(cluster, folder):
    """As the notebook does, and with its own lines in tracebacks."""
    write(folder / "followed_b.py", FACTOR.format(2))
    import followed_b

    write(folder / "followed_b.py", FACTOR.format(4))
    assert 2.0 == loss_of(train(cluster, followed_b.Scaled(6, 3), step=SCALED))
    assert ["2"] * 2 == prints(cluster, "import followed_b\nprint(followed_b.FACTOR)")
    prints(cluster, "import importlib\nimportlib.reload(followed_b)")  # a cell may read the file
    assert ["4"] * 2 == prints(cluster, "print(followed_b.FACTOR)")


def test_a_module_that_engines_imported_earlier_than_the_notebook_runs_its_text(cluster, folder):
    """The notebook imported it after an edit."""
    write(folder / "followed_c.py", FACTOR.format(2))
    prints(cluster, "import followed_c")
    write(folder / "followed_c.py", FACTOR.format(4))
    import followed_c

    assert 4.0 == loss_of(train(cluster, followed_c.Scaled(6, 3), step=SCALED))


def test_modules_run_again_in_the_notebooks_turn(cluster, folder):
    """One that takes a number of another has the new number if it ran after it, else the old one."""
    write(folder / "followed_d.py", "NUMBER = 1\n")
    write(folder / "followed_e.py", "from followed_d import NUMBER\n")
    import followed_d
    import followed_e

    show = "import followed_e\nprint(followed_e.NUMBER)"
    assert ["1"] * 2 == prints(cluster, show)
    write(folder / "followed_d.py", "NUMBER = 2\n")
    importlib.reload(followed_e)
    importlib.reload(followed_d)
    assert [str(followed_e.NUMBER)] * 2 == ["1"] * 2 == prints(cluster, show)
    write(folder / "followed_d.py", "NUMBER = 3\n")
    importlib.reload(followed_d)
    importlib.reload(followed_e)
    assert [str(followed_e.NUMBER)] * 2 == ["3"] * 2 == prints(cluster, show)


def test_a_module_that_cannot_run_again_on_an_engine_is_named(cluster, folder):
    """The run is refused; once it can, all is well."""
    text = "import os\n\nif os.environ.get('RANK'):\n    {0}\nFACTOR = 1\n"
    write(folder / "followed_f.py", text.format("pass"))
    import followed_f

    prints(cluster, "import followed_f")
    write(folder / "followed_f.py", text.format("raise ValueError('only once')"))
    importlib.reload(followed_f)
    for _ in range(2):
        with pytest.raises(TaskError, match=r"module followed_f has run again in the notebook, but raises Val"):
            train(cluster, loss="cross_entropy")
    write(folder / "followed_f.py", text.format("pass"))
    importlib.reload(followed_f)
    assert "finished" == train(cluster, loss="cross_entropy").state


def test_a_replaced_engine_sees_each_cell_with_the_notebook_of_its_time(cluster, folder, monkeypatch):
    """Its folder and variables, then what came after it; and texts that no file holds any more."""
    (folder / "a").mkdir()
    (folder / "a" / "value.txt").write_text("from a")
    write(folder / "followed_g.py", FACTOR.format(2))
    import followed_g

    monkeypatch.setenv("FOLLOWED", "first")
    os.chdir(folder / "a")
    prints(cluster, "import os, followed_g\nread, two = open('value.txt').read(), followed_g.FACTOR")
    prints(cluster, "seen = os.environ['FOLLOWED']")
    os.chdir(folder)
    monkeypatch.setenv("FOLLOWED", "second")
    write(folder / "followed_g.py", FACTOR.format(4))
    importlib.reload(followed_g)
    write(folder / "followed_g.py", FACTOR.format(8))
    show = "print(read, seen, two, os.environ['FOLLOWED'], followed_g.FACTOR, os.getcwd())"
    expected = [f"from a first 2 second 4 {folder}"] * 2
    assert expected == prints(cluster, show)
    process = psutil.Process(cluster.engines[1].pid)
    process.kill()
    assert gone([process])
    assert 4.0 == loss_of(train(cluster, followed_g.Scaled(6, 3), step=SCALED))  # before the cells run there
    assert expected == prints(cluster, show)


def test_a_queued_run_has_the_notebook_of_its_command(cluster, monkeypatch):
    """Not of the moment at which it starts."""

    def step(model, batch):
        return model(batch[0]).sum() * 0 + float(os.environ["FOLLOWED"])

    runs = []
    for value in "123":
        monkeypatch.setenv("FOLLOWED", value)
        runs.append(train(cluster, step=by_value(step), background=True))
    for run in runs:
        run.wait()
    assert [1.0, 2.0, 3.0] == [loss_of(run) for run in runs]


def stderr_of_run(cluster):
    return train(cluster, loss="cross_entropy").printed("stderr")


def stderr_of_cell(cluster):
    cell = cluster.execute("1")
    cell.wait()
    return cell.printed("stderr")


@pytest.mark.parametrize("show", [stderr_of_run, stderr_of_cell])
def test_a_folder_that_an_engine_cannot_enter_is_noted(cluster, tmp_path, monkeypatch, show):
    """As on another host, where it is not."""
    folder, changes = tmp_path / "left", cluster._changes
    monkeypatch.chdir(tmp_path)
    changes.look()
    folder.mkdir()
    os.chdir(folder)
    count = changes.look()
    os.chdir(tmp_path)
    folder.rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(changes, "look", lambda: count)
        shown = [text.strip() for text in show(cluster).values()]
    assert [f"nbdist: the notebook's folder {folder} cannot be entered here (No such file or directory)"] * 2 == shown
