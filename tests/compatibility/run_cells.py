"""Runs the cells of a notebook, and saves what they have found.

python tests/compatibility/run_cells.py FOUND < CELLS    a JSON list; the last cell leaves a dict called `found`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]


def main(found: str) -> None:
    """Run them in a folder of their own."""
    from shells import running_shell

    path = Path(found).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with running_shell(folder) as shell:
            for cell in json.load(sys.stdin):
                shell.run_cell(cell, store_history=True).raise_error()
            torch.save(shell.user_ns["found"], path)
        os.chdir(path.parent)


if __name__ == "__main__":
    main(sys.argv[1])
