"""The panel of many engines and of a pipeline: the real widget in a real browser, fed by ranks that are made."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import made
import pytest
from playwright.sync_api import expect


@pytest.fixture
def open_made(lab, open_notebook):
    """Opens a notebook of one cell, ``from made import show`` and what is given."""
    shutil.copy(Path(made.__file__), lab.folder)
    return lambda name, call: open_notebook(name, f"from made import show\n{call}")


def test_64_engines_stay_on_one_screen(open_made):
    """A cell each in a strip; rows for who is lost, slow, and the slowest of the others."""
    with open_made("many.ipynb", 'show(64, "dp=64", steps=60)') as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        panel = sheet.panel
        cells = panel.locator(".nbdist-strip [data-rank]")
        expect(cells).to_have_count(64)
        ranks = panel.locator("tr[data-rank]").evaluate_all(
            "rows => rows.map(row => [row.dataset.rank, row.dataset.state])"
        )
        assert 8 == len(ranks)
        assert [[str(made.LOST), "lost"], [str(made.SLOW), "slow"]] == ranks[:2]
        expect(panel.locator(f".nbdist-strip [data-rank='{made.LOST}']")).to_have_attribute(
            "aria-label", f"rank {made.LOST}: lost"
        )
        expect(panel.locator("dd").last).to_contain_text("about 7 min")
        assert panel.bounding_box()["height"] < 640
        sheet.shot("64-engines")


def test_a_pipeline_is_grouped_by_stage(open_made):
    """Each group says which modules it holds."""
    with open_made("pipeline.ipynb", 'show(8, "dp=2,pp=4")') as sheet:
        sheet.run_all()
        sheet.expect_state("running")
        lines = sheet.panel.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => row.dataset.rank ?? row.innerText)"
        )
        assert [f"stage {i}: blocks.{3 * i} to blocks.{3 * i + 2}" for i in range(4)] == lines[::3]
        assert sorted(map(str, range(8))) == sorted(line for line in lines if re.fullmatch(r"\d", line))
        sheet.shot("pipeline")
