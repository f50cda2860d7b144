"""A kernel is killed in the middle of a training, as a user sees it; another notebook takes the training over."""

from __future__ import annotations

import psutil
from playwright.sync_api import expect
from test_panel import ENDLESS, NET, START

ATTACH = "%load_ext nbdist\n%dist_attach -o run"
AFTER = "run.wait()\nprint('weights of', type(model).__name__, 'after step', run.progress.step)"


def test_the_panel_goes_on_in_another_notebook(open_notebook):
    """With the steps that were done, the charts and the engines; its buttons work, and the weights arrive."""
    with open_notebook("first.ipynb", f"{START} --detach", NET, f"{ENDLESS} --background") as first:
        first.run_all()
        first.expect_state("running")
        first.expect_step_after(500)
        server = psutil.Process(first.lab._server.pid)
        (kernel,) = [p for p in server.children() if "ipykernel_launcher" in " ".join(p.cmdline())]
        kernel.kill()
    with open_notebook("second.ipynb", ATTACH, AFTER, "%dist_stop --all") as second:
        second.run_all()
        second.expect_state("running")
        second.expect_step_after(500)
        panel = second.panel
        expect(panel.locator("tr[data-rank]")).to_have_count(2)
        expect(panel.locator("svg[role=img]").first).to_be_visible()
        second.expect_step_after(second.step())
        second.shot("attached")
        second.button("Stop").click()
        expect(second.static).to_contain_text("stopped")
        expect(second.page.locator(".jp-Notebook")).to_contain_text("weights of Sequential after step")
        expect(second.page.locator(".jp-Notebook")).to_contain_text("stopped 2 engines")
