"""What is reached from a step, and what is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nbdist.core.params.program_state import ProgramState

PACKAGE = """
import itertools
NAMES = itertools.count()
def step(): return next(NAMES)
"""
ASK = """
import a_package
from nbdist.core.params.program_state import ProgramState
print(ProgramState({'step': a_package.step}).iterators)
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
    assert [] == ProgramState({"step": names["apart"]}).iterators
    assert ["data"] == ProgramState({"step": names["reaching"]}).iterators
