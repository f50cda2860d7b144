"""`%dist_where` in a notebook."""

from __future__ import annotations

import pytest
from kernels import Kernel

MODEL = """\
import time, torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x):
        if int(__import__("os").environ["RANK"]) == 1:
            time.sleep(1e4)
        return self.layer(x)
data = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)
"""


@pytest.mark.programs
def test_it_names_the_cell_that_hangs_by_its_number(home, tmp_path):
    """With the lines around it; the run then ends and leaves nothing behind."""
    kernel = Kernel(tmp_path)
    try:
        kernel("%load_ext nbdist\n%dist_start -n 2 --device cpu")
        number = int(kernel(MODEL + "get_ipython().displayhook.prompt_count").outputs[-1]["data"]["text/plain"])
        kernel("run = %dist_train Net() data --loss cross_entropy --background")
        wait = (
            "look, said = nbdist.current_cluster().where, ''\n"
            "while 'in forward; rank 0 waits' not in said or said != look().verdict: said = look().verdict"
        )  # twice the same: while a run begins, ranks wait for each other too
        cell = kernel(f"import nbdist\n{wait}\n%dist_where\nrun.stop(now=True)\nrun.wait().state")
        text = "".join(output["text"] for output in cell.outputs if output["type"] == "stream")
        assert text.startswith(f"rank 1 is at Cell In[{number}], line 9, in forward; rank 0 waits for it in ")
        assert "---->   9             time.sleep(1e4)" in text
        assert "'stopped'" == cell.outputs[-1]["data"]["text/plain"]
    finally:
        kernel.shut_down()
