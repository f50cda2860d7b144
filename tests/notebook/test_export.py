"""``%dist_export``: the newest run as a script, with the run's bits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nbdist.errors import PlanError

SETUP = """\
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(5)

class Small(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x):
        return self.layers(halved(x))

def halved(x):
    return x / 2
"""
DATA = """\
points = torch.randn(40, 6)
labels = torch.randint(3, (40,))
net = Small(width=8)
points.mean()
"""
TRAIN = "--batch-size 8 --epochs 2 --optimizer adamw --lr 0.02 --seed 4"


def trained(folder, file, ranks):
    """The weights that the script ends with, on so many processes."""
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), file]
    ended = subprocess.run(launched, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / file.replace(".py", ".trained.pt"))


@pytest.fixture
def folder(tmp_path):
    """Where scripts are written."""
    return tmp_path / "work"


@pytest.fixture
def cells(notebook, monkeypatch, tmp_path):
    """Runs cells, in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    notebook.names.pop("model", None)
    notebook(SETUP)
    notebook(DATA)
    return notebook


@pytest.mark.programs
def test_a_line_becomes_a_script_of_the_same_bits(cells, folder):
    """Only what it needs is in it; a rate keeps no name, and what was chosen by the machine is written down."""
    cells("unused = 3\nrate = 0.02")
    cells("%dist_train net (points, labels) --loss cross_entropy --lr rate --batch-size 8 --epochs 2 --optimizer sgd")
    cells.printed()
    cells("%dist_export train.py")
    assert "wrote train.py, for torchrun --nproc-per-node 2 train.py\n" == cells.printed()
    text = (folder / "train.py").read_text()
    for part in ("unused", "rate =", "functional", ".mean()", "start.pt", "get_ipython"):
        assert part not in text
    for part in ('loss="cross_entropy"', "lr=0.02", "threads=1", "def halved", "torch.manual_seed(5)"):
        assert part in text
    assert sorted(path.name for path in folder.iterdir()) == ["train.py"]
    torch.testing.assert_close(trained(folder, "train.py", 2), cells.names["net"].state_dict(), rtol=0, atol=0)


STEP = f"""\
%%dist_train net (points, labels) {TRAIN}
x, y = batch
text = '''
two lines'''
output = model(x + 0.1 * torch.randn_like(x))
loss = F.cross_entropy(output, y)
log = {{"right": (output.argmax(1) == y).float().mean()}}
"""


@pytest.mark.programs
def test_a_step_cell_and_its_resume_are_one_run(cells, folder):
    """From the weights that the first of the two began with, which another run had left."""
    cells(f"%dist_train net (points, labels) --loss cross_entropy {TRAIN}")
    cells(STEP)
    cells("%dist_train --resume --epochs 3")
    cells.printed()
    cells("%dist_export train.py")
    assert "train.start.pt has the weights at the start, which the cells do not make again" in cells.printed()
    text = (folder / "train.py").read_text()
    assert "epochs=3" in text
    assert r"\ntwo lines" in text
    torch.testing.assert_close(trained(folder, "train.py", 2), cells.names["net"].state_dict(), rtol=0, atol=0)


GAN = """\
%%dist_train pair points --optimizer adam --batch-size 8 --epochs 2
fake = model["g"](batch[:, :2])
nbdist.update(F.softplus(-model["d"](batch)).mean() + F.softplus(model["d"](fake.detach())).mean(), "d")
nbdist.update(F.softplus(-model["d"](fake)).mean(), "g")
"""


@pytest.mark.programs
def test_several_modules_and_data_without_a_seed(cells, folder):
    """What no seed decides is kept beside the script."""
    cells("import nbdist\nwith torch.random.fork_rng():\n    torch.seed()\n    points = torch.randn(40, 6)")
    cells('pair = {"d": nn.Linear(6, 1), "g": nn.Linear(2, 6)}')
    cells("adam = {name: torch.optim.Adam(module.parameters()) for name, module in pair.items()}")
    cells(GAN)
    cells.printed()
    cells("%dist_export gan.py")
    assert "gan.start.pt has" in cells.printed()
    found = trained(folder, "gan.py", 2)
    for name, module in cells.names["pair"].items():
        torch.testing.assert_close(found[name], module.state_dict(), rtol=0, atol=0)


def test_what_cannot_be_made_again_is_a_sentence(cells, folder):
    """And nothing is written."""
    with pytest.raises(PlanError, match=r"train\.txt is to be a script"):
        cells(f"%dist_train net (points, labels) --loss cross_entropy {TRAIN}\n%dist_export train.txt")
    cells.names["other"] = cells.names["net"]
    cells(f"%dist_train other (points, labels) --loss cross_entropy {TRAIN}")
    with pytest.raises(PlanError, match="other is used by the run, and no cell of this notebook assigns it"):
        cells("%dist_export train.py")
    cells("net.extra = nn.Linear(2, 2) if False else None; net.layers[0].weight.requires_grad = False")
    cells("files = !printf 3\nwidth = int(files[0])\nthird = Small(width)")
    cells(f"%dist_train third (points, labels) --loss cross_entropy {TRAIN}")
    with pytest.raises(PlanError, match="files comes from a magic or a shell command"):
        cells("%dist_export train.py")
    cells.names["cluster"] = __import__("nbdist").current_cluster()
    cells('cluster.train(net, (points, labels), loss="cross_entropy", epochs=1, batch_size=8)')
    with pytest.raises(PlanError, match=r"was not started by %dist_train"):
        cells("%dist_export train.py")
    assert not list(folder.iterdir())


def test_a_model_that_was_changed_out_of_sight_is_named(cells):
    """Where the script would train another one."""
    cells.names["net"].layers[0].weight.requires_grad = False
    cells(f"%dist_train net (points, labels) --loss cross_entropy {TRAIN}")
    with pytest.raises(PlanError, match="the cells make another net than the run trained"):
        cells("%dist_export train.py")
