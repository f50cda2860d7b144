"""`%dist_status` and `%dist_help` in a notebook."""

from __future__ import annotations

import pytest
from kernels import Kernel

from nbdist.errors import PlanError
from nbdist.notebook.dist_help import help_text, help_text_of
from nbdist.notebook.parsers import PARSERS

FOLLOWED = """%dist_status
import os, time
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
wait_for("stop")
run.stop()
run.wait()
wait_for("end")"""


def follow(cell, folder):
    """Let the cell stop its run once the table has changed twice, and end once the table shows the stop."""
    if not cell.outputs:
        return
    shown = cell.outputs[0]
    if len(shown["before"]) >= 2 and "samples/s, " in shown["data"]["text/plain"]:
        (folder / "stop").touch()
    if "stopped" in shown["data"]["text/html"] and "busy" not in shown["data"]["text/plain"]:
        (folder / "end").touch()


@pytest.mark.programs
def test_the_status_follows_a_run_to_its_end(home, tmp_path):
    """The table in the cell changes while engines work, and keeps the final state afterwards."""
    kernel = Kernel(tmp_path)
    try:
        kernel("%load_ext nbdist\n%dist_start -n 2 --device cpu\nimport torch\nfrom torch import nn")
        kernel("data = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)")
        kernel("run = %dist_train nn.Linear(6, 3) data --loss cross_entropy --steps 100000000 --background")
        cell = kernel.run(FOLLOWED, when=lambda cell: follow(cell, tmp_path))
        assert cell.status == "ok", cell.reply
        shown = cell.outputs[0]
        first, *_ = [*shown["before"], shown["data"]]
        assert "busy" in first["text/plain"]
        assert len(shown["before"]) >= 2
        assert any("samples/s, " in bundle["text/plain"] for bundle in shown["before"])
        last = shown["data"]
        assert "busy" not in last["text/plain"]
        assert "stopped" in last["text/html"]
    finally:
        kernel.shut_down()


def test_help_fits_on_a_screen():
    """Every magic has its line."""
    lines = help_text().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(any(line.split()[:1] == [name] for line in lines) for name in PARSERS)


def test_help_of_one_magic(notebook):
    """By its name, with or without its prefix."""
    for name in ("dist_train", "%dist_train", "train", "%%dist_train"):
        notebook(f"%dist_help {name}")
        assert "--strategy" in notebook.printed()
    with pytest.raises(PlanError, match="Did you mean 'dist_train'"):
        help_text_of("dist_trian")
