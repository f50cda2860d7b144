"""The benchmarks name what is in the package: they patch and import parts that no other test would miss."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from nbdist.core.reporter import Reporter

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
PEERS = {"accelerate"}
"""Installed by ``make bench`` only."""


def load(script, monkeypatch):
    """The module of a script, made anew; nothing stays of it, nor of those in its folder that it imports."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in SCRIPTS:  # the tests have a module called ranks too
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        return importlib.import_module(script)
    finally:
        for name in SCRIPTS:
            sys.modules.pop(name, None)  # what was there before, monkeypatch puts back


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_imports(script, monkeypatch):
    """What it takes from the package is there."""
    try:
        load(script, monkeypatch)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in PEERS:
            raise


def test_what_the_panels_benchmark_patches_is_there(monkeypatch):
    """It counts what the reporter spends, and silences it."""
    names = {}
    given = Reporter.report_if_due, Reporter.add_totals
    try:
        exec(load("panel", monkeypatch).COUNT, names)
        for silent in (True, False):
            names["silence"](silent)
            assert given != (Reporter.report_if_due, Reporter.add_totals)
    finally:
        Reporter.report_if_due, Reporter.add_totals = given
