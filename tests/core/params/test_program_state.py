"""What is reached from a step, and what is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nbdist.core.params.program_state import ProgramState

PACKAGE = """
import itertools
NAMES = itertools.count()
def step(): return next(NAMES)
"""
ASK = """
import a_package
from nbdist.core.params.program_state import ProgramState
print(list(ProgramState({'step': a_package.step}).iterators))
"""


@pytest.mark.parametrize(("installed", "found"), [(True, "[]"), (False, "['NAMES']")])
def test_a_package_of_any_folder_of_packages_is_no_code_of_the_user(tmp_path, installed, found):
    """As of ``pip install --target`` or ``--user``."""
    (tmp_path / "a_package.py").write_text(PACKAGE)
    if installed:
        (tmp_path / "a_package-1.0.dist-info").mkdir()
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert ran.stdout.strip() == found, ran.stderr


def test_an_attribute_is_no_global():
    """A step that reads ``x.data`` does not reach what the notebook calls `data`; one that reads `data` does."""
    names = {"data": iter([1])}
    exec("def apart(x): return x.data.mean()\ndef reaching(x): return next(data)", names)
    assert {} == ProgramState({"step": names["apart"]}).iterators
    assert ["data"] == list(ProgramState({"step": names["reaching"]}).iterators)


@pytest.mark.parametrize("count", [1000, 1001, 3000])
@pytest.mark.parametrize("make", [dict, list])
def test_values_of_large_containers_are_put_back(count, make):
    """They are data only if the values are numbers or texts, whatever the keys of a dict are."""
    bank = {i: torch.zeros(2) for i in range(count)} if make is dict else [torch.zeros(2) for _ in range(count)]
    state = ProgramState({"bank": bank})
    bank[1] += 1
    assert ["bank[1]"] == state.changes()
    state.restore()
    assert [0.0, 0.0] == bank[1].tolist()


def test_a_file_is_no_iterator_that_matters():
    """Such as the writer of TensorBoard, which has `__next__`."""

    class Writer:
        def write(self, text):
            return text

        def __next__(self):
            raise StopIteration

    writer = Writer()
    assert {} == ProgramState({"step": lambda x: writer.write(x)}).iterators
