"""The panel of a run over several hosts, in JupyterLab: where ranks are, and what becomes of those of a lost host."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "browser"))

CELLS = (
    "%load_ext nbdist\nimport torch\nfrom torch import nn\n%dist_start --hosts local:1,h1:1,h2:2 --device cpu",
    """torch.manual_seed(0)
x, w = torch.randn(4000, 32), torch.randn(32, 8)
y = (x @ w).argmax(1)
model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 8))""",
    "%dist_train model (x, y) --loss cross_entropy --lr 0.001 --batch-size 64 --strategy dp=2,pp=2 --epochs 100000000 "
    "--val (x[:500], y[:500]) --metric accuracy",
)


@pytest.fixture
def sheet(network, tmp_path):
    """A notebook on the head, whose cells start engines on both hosts and train."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    from sheets import WITHIN_MS, Lab, launch, opened

    if (executable := shutil.which("chromium")) is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    playwright.expect.set_options(timeout=WITHIN_MS)
    lab = Lab(tmp_path, {})
    try:
        with playwright.sync_playwright() as driver:
            browser = launch(driver, executable)
            with opened(browser, lab, "hosts.ipynb", *CELLS) as sheet:
                yield sheet
            browser.close()
    finally:
        lab.close()


def test_ranks_of_a_lost_host_move(sheet, network):
    """Each row names its host; the event line says what happened, and the run goes on."""
    from playwright.sync_api import expect

    sheet.run_all()
    sheet.expect_state("running")
    sheet.expect_step_after(1000)
    rows = [sheet.panel.locator(f"tr[data-rank='{rank}']") for rank in range(4)]
    for row, host in zip(rows, ("head", "h1", "h2", "h2"), strict=True):
        expect(row).to_contain_text(host)
    network.crash("h2")
    expect(sheet.panel).to_contain_text(re.compile(r"ranks 2-3 lost \(host h2 lost\), replaced in"))
    sheet.expect_state("running")
    sheet.expect_step_after(sheet.step() + 1000)
    for row in rows:
        expect(row).to_contain_text(re.compile("head|h1"))
    sheet.shot("hosts")
    sheet.button("Stop").click()
    expect(sheet.static).to_be_visible()
