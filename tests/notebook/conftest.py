"""A notebook without a front end: a real IPython shell in this process, and a real kernel in another one."""

from __future__ import annotations

import psutil
import pytest
from IPython.core.interactiveshell import InteractiveShell
from net import NET
from shared_cluster import HUNG_S
from shells import running_shell


class Notebook:
    """Runs cells in order, as a user does."""

    def __init__(self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell = shell
        self.names = shell.user_ns
        self._capsys = capsys

    def __call__(self, *cells):
        """Run cells that must not fail; return the value of the last one."""
        for cell in cells:
            result = self.shell.run_cell(cell, store_history=True)
            result.raise_error()
        return result.result

    def fails(self, cell):
        """Run a cell that must fail; return the error and the output."""
        self.printed()
        result = self.shell.run_cell(cell, store_history=True)
        assert not result.success
        return result.error_in_exec or result.error_before_exec, self.printed()

    def printed(self):
        """The output since the last call."""
        captured = self._capsys.readouterr()
        return captured.out + captured.err


@pytest.fixture
def notebook(cluster, capsys, tmp_path):
    """A fresh notebook with nbdist loaded, a model `model` and data `train_set`, `test_set`; the cluster runs."""
    with running_shell(tmp_path) as shell:
        notebook = Notebook(shell, capsys)
        notebook("%load_ext nbdist", NET)
        yield notebook


@pytest.fixture(scope="module")
def kernel(shared_cluster, tmp_path_factory):
    """A real kernel with nbdist loaded, two engines of its own, and `model`, `train_set`, `test_set`.

    It stands in a folder in which a module lies beside the notebook. `started` is the cell that started the engines.
    """
    from kernels import Kernel

    folder = tmp_path_factory.mktemp("notebook")
    (folder / "beside.py").write_text("from torch import nn\n\nclass Beside(nn.Linear):\n    pass\n")
    kernel = Kernel(folder)
    kernel("%load_ext nbdist")
    kernel.started = kernel("%dist_start -n 2 --device cpu")
    kernel(NET)
    processes, _ = kernel.cluster()
    yield kernel
    kernel.kill()
    psutil.wait_procs(processes, timeout=HUNG_S)
